"""Each loss against loops over single tokens in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fireflyer.model.decoder import TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.train import losses
from fireflyer.train.losses import LossTerms, head_cross_entropy, mtp_labels, training_losses

B, T, D, V, E, K = 3, 7, 5, 11, 4, 2
DEPTHS = 2


def make_output(seed: int, rows: int = B) -> tuple[TrunkOutput, Tensor, Tensor, Tensor]:
    """A trunk's output, head, labels with holes and documents, in float64 with gradients on all inputs."""
    g = torch.Generator().manual_seed(seed)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    hidden, head = leaf(rows, T, D), leaf(V, D)
    mtp = [leaf(rows, T - k, D) for k in range(1, DEPTHS + 1)]
    routing = []
    for layer in range(2):
        scores = torch.rand(rows * T, E, generator=g, dtype=torch.float64).requires_grad_()
        routing.append(Routing(layer, scores, scores.detach().topk(K).indices, (rows, T)))
    labels = torch.randint(0, V, (rows, T), generator=g)
    labels[torch.rand(rows, T, generator=g) < 0.3] = -100
    labels[0, :4] = -100  # unequal counts a row
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [2] * 7, [3, 4, 4, 5, 5, 5, 5]])[:rows]
    return TrunkOutput(hidden, mtp, routing), head, labels, documents


def naive_token_loss(hidden: Tensor, head: Tensor, label: int) -> Tensor:
    logits = [sum(hidden[d] * head[v, d] for d in range(D)) for v in range(V)]
    return -(logits[label] - torch.stack([torch.exp(x) for x in logits]).sum().log())


def naive_terms(out: TrunkOutput, head: Tensor, labels: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Main and MTP loss by loops, straight from the report: T is the number of valid main labels."""
    valid = sum(int(label) != -100 for row in labels for label in row)
    main = torch.zeros((), dtype=torch.float64)
    mtp = torch.zeros((), dtype=torch.float64)
    for b in range(labels.shape[0]):
        for i in range(T):
            if labels[b, i] != -100:
                main = main + naive_token_loss(out.hidden_BTD[b, i], head, int(labels[b, i])) / valid
            for k in range(1, DEPTHS + 1):
                if i + k >= T or labels[b, i + k] == -100:
                    continue
                if documents is not None and documents[b, i] != documents[b, i + k]:
                    continue
                term = naive_token_loss(out.mtp_hidden[k - 1][b, i], head, int(labels[b, i + k]))
                mtp = mtp + term / valid / DEPTHS
    return main, mtp


def leaves(out: TrunkOutput, head: Tensor) -> list[Tensor]:
    return [out.hidden_BTD, *out.mtp_hidden, head]


def whole_batch(out: TrunkOutput, head: Tensor, labels: Tensor, documents: Tensor | None) -> LossTerms:
    return training_losses(
        out,
        head,
        labels,
        documents,
        num_experts_per_tok=K,
        valid_in_batch=losses.count_valid(labels),
        rows_in_batch=labels.shape[0],
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 3 * V, 1 << 22])
def test_main_and_mtp_match_loops_with_gradients(masked: bool, chunk_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", chunk_elements)
    out, head, labels, documents = make_output(0)
    used = documents if masked else None
    terms = whole_batch(out, head, labels, used)
    main, mtp = naive_terms(out, head, labels, used)
    torch.testing.assert_close(terms.main, main, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.mtp, mtp, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(terms.main + 0.3 * terms.mtp, leaves(out, head))
    theirs = torch.autograd.grad(main + 0.3 * mtp, leaves(out, head))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_mtp_shift_by_hand():
    """Tokens 10..15 give labels 11..15; depth 1 predicts from token 10 (with 11's embedding) the token 12."""
    labels = torch.tensor([[11, 12, 13, 14, 15]])
    assert mtp_labels(labels, None, 1).tolist() == [[12, 13, 14, 15]]
    assert mtp_labels(labels, None, 2).tolist() == [[13, 14, 15]]
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert mtp_labels(labels, documents, 1).tolist() == [[12, 13, -100, 15]]
    assert mtp_labels(labels, documents, 2).tolist() == [[13, -100, -100]]


def test_depth_is_divided_by_t_not_by_its_own_count():
    """With a zero head every token costs ln V: depth k then gives (T-k)/T of it, and depths are averaged."""
    out, head, labels, _ = make_output(1)
    labels = labels.clamp(min=0)
    terms = whole_batch(out, torch.zeros_like(head), labels, None)
    assert terms.main.item() == pytest.approx(math.log(V))
    assert terms.mtp.item() == pytest.approx(math.log(V) * ((T - 1) / T + (T - 2) / T) / 2)


def test_balance_sums_layers_and_averages_sequences():
    """Naive equations 17 to 20 for each sequence and layer."""
    out, head, labels, _ = make_output(2)
    terms = whole_batch(out, head, labels, None)
    expected = 0.0
    for routing in out.routing:
        scores = routing.scores_NE.detach().reshape(B, T, E)
        for b in range(B):
            for e in range(E):
                f = sum(e in sorted(range(E), key=lambda j: -scores[b, t, j])[:K] for t in range(T)) * E / (K * T)
                p = sum(float(scores[b, t, e] / scores[b, t].sum()) for t in range(T)) / T
                expected += f * p / B
    assert terms.balance.item() == pytest.approx(expected, rel=1e-6)
    assert terms.total(0.3, 0.5).item() == pytest.approx((terms.main + 0.3 * terms.mtp + 0.5 * terms.balance).item())


def slice_output(out: TrunkOutput, b: int) -> TrunkOutput:
    routing = [
        Routing(r.layer_index, r.scores_NE[b * T : (b + 1) * T], r.indices_NK[b * T : (b + 1) * T], (1, T))
        for r in out.routing
    ]
    return TrunkOutput(out.hidden_BTD[b : b + 1], [h[b : b + 1] for h in out.mtp_hidden], routing)


def test_split_into_micro_batches_changes_nothing():
    """B=3 at once and three times B=1, with ragged masks: same values, same gradients, the balance loss's too."""
    out, head, labels, documents = make_output(3)
    inputs = [*leaves(out, head), *(r.scores_NE for r in out.routing)]
    whole = whole_batch(out, head, labels, documents).total(0.3, 0.5)
    parts = torch.zeros((), dtype=torch.float64)
    for b in range(B):
        terms = training_losses(
            slice_output(out, b),
            head,
            labels[b : b + 1],
            documents[b : b + 1],
            num_experts_per_tok=K,
            valid_in_batch=losses.count_valid(labels),
            rows_in_batch=B,
        )
        parts = parts + terms.total(0.3, 0.5)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    for a, b in zip(torch.autograd.grad(parts, inputs), torch.autograd.grad(whole, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_no_valid_label_gives_zero_not_nan():
    out, head, labels, _ = make_output(4)
    terms = whole_batch(out, head, torch.full_like(labels, -100), None)
    assert terms.main.item() == 0.0
    assert terms.mtp.item() == 0.0
    for gradient in torch.autograd.grad(terms.main + terms.mtp, leaves(out, head)):
        assert bool((gradient == 0).all())


def test_row_with_one_token_has_no_mtp():
    """T = 1 leaves no depth anything to predict: the mean over no depth is 0."""
    hidden, head = torch.randn(2, 1, D), torch.randn(V, D)
    terms = whole_batch(TrunkOutput(hidden, [], []), head, torch.tensor([[1], [2]]), None)
    assert terms.mtp.item() == 0.0
    assert math.isfinite(terms.main.item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_in_lower_precision_stays_near_float64(dtype: torch.dtype):
    out, head, labels, _ = make_output(5)
    exact = head_cross_entropy(out.hidden_BTD, head, labels)
    grads = torch.autograd.grad(exact, [out.hidden_BTD, head])
    hidden = out.hidden_BTD.detach().to(dtype).requires_grad_()
    weight = head.detach().float().requires_grad_()  # master weights stay fp32
    low = head_cross_entropy(hidden, weight, labels)
    assert low.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(low.double(), exact, rtol=tolerance, atol=0)
    for a, b in zip(torch.autograd.grad(low, [hidden, weight]), grads, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_logits_never_exist_whole(monkeypatch: pytest.MonkeyPatch):
    """No tensor of the chunked head is as large as rows x vocabulary."""
    monkeypatch.setattr(losses, "_CHUNK_ELEMENTS", 64 * 50)
    hidden = torch.randn(400, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[override]
            result = func(*args, **(kwargs or {}))
            sizes.extend([result.numel()] if isinstance(result, Tensor) else [])
            return result

    with Watch():
        head_cross_entropy(hidden, weight, torch.zeros(400, dtype=torch.int64)).backward()
    assert 64 * 50 <= max(sizes) < 400 * 50 // 2
