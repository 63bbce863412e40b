"""Balance: the sequence-wise loss against the report's sums, the bias rule by hand and at work, recomputation."""

import pytest
import torch

from fireflyer.model.routing import (
    expert_counts,
    max_violation,
    route,
    sequence_balance_loss,
    stable_top_k,
    update_gate_bias_,
)


def naive_balance_loss(scores_TE, per_token):
    """Report eq. 17-20 without α, one expert and token at a time."""
    tokens, experts = len(scores_TE), len(scores_TE[0])
    loss = 0.0
    for i in range(experts):
        chosen = 0
        for row in scores_TE:
            better = sum(s > row[i] or (s == row[i] and j < i) for j, s in enumerate(row))
            chosen += better < per_token
        f = experts / (per_token * tokens) * chosen
        p = sum(row[i] / sum(row) for row in scores_TE) / tokens
        loss += f * p
    return loss


@pytest.mark.parametrize(("batch", "tokens", "experts", "per_token"), [(1, 1, 4, 1), (3, 7, 8, 3), (2, 20, 16, 4)])
def test_sequence_loss_equals_the_sums_of_the_report(batch, tokens, experts, per_token):
    scores = torch.rand(batch * tokens, experts, generator=torch.Generator().manual_seed(0))
    loss = sequence_balance_loss(scores, (batch, tokens), per_token)
    rows = scores.double().view(batch, tokens, experts).tolist()
    assert float(loss) == pytest.approx(sum(naive_balance_loss(row, per_token) for row in rows) / batch, rel=1e-5)


def test_sequence_loss_by_hand():
    """One sequence of two tokens, four experts, two per token.

    Top two: {0, 1} and {0, 2}, so the counts are 2 1 1 0 and f = 4 / (2 · 2) · counts = 2 1 1 0. Scores normalised:
    .5 .3 .1 .1 and .4 .1 .4 .1, so P = .45 .20 .25 .10, and Σ f·P = .90 + .20 + .25 = 1.35.
    """
    scores = torch.tensor([[1.0, 0.6, 0.2, 0.2], [0.8, 0.2, 0.8, 0.2]])
    assert float(sequence_balance_loss(scores, (1, 2), 2)) == pytest.approx(1.35)


def test_sequence_loss_is_one_in_perfect_balance():
    assert float(sequence_balance_loss(torch.eye(8) + 0.1, (1, 8), 1)) == pytest.approx(1.0)


def test_sequence_loss_learns_through_p_alone():
    """With f held as a constant, the gradient by autograd of the plain formula."""
    scores = torch.rand(12, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sequence_balance_loss(scores, (2, 6), 2).backward()
    twin = scores.detach().clone().requires_grad_()
    loss = torch.tensor(0.0)
    for sequence in range(2):
        rows = twin[sequence * 6 : sequence * 6 + 6]
        f = torch.bincount(rows.topk(2).indices.flatten(), minlength=6) * (6 / (2 * 6))
        loss = loss + (f * (rows / rows.sum(1, keepdim=True)).mean(0)).sum() / 2
    loss.backward()
    torch.testing.assert_close(scores.grad, twin.grad)
    assert scores.grad is not None
    assert scores.grad.abs().max() > 0


def test_sequence_loss_does_not_depend_on_how_a_batch_is_cut():
    """One call of four sequences and the mean of four calls: the same value and the same gradient."""
    scores = torch.rand(4 * 9, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    whole = sequence_balance_loss(scores, (4, 9), 3)
    whole.backward()
    twin = scores.detach().clone().requires_grad_()
    parts = [sequence_balance_loss(rows, (1, 9), 3) / 4 for rows in twin.split(9)]
    sum(parts, torch.tensor(0.0)).backward()
    torch.testing.assert_close(sum(parts, torch.tensor(0.0)), whole)
    torch.testing.assert_close(scores.grad, twin.grad)


def test_parts_of_a_sequence_add_up_to_its_loss():
    """As ranks that each hold some of the tokens compute it: uneven parts, counts summed by whoever holds them."""
    scores = torch.rand(2, 10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    whole = sequence_balance_loss(scores.flatten(0, 1), (2, 10), 3)
    chosen = torch.zeros(2, 10, 8).scatter_(2, stable_top_k(scores, 3), 1.0).sum(1)
    parts = [scores[:, part] for part in (slice(0, 7), slice(7, 10))]
    losses = [
        sequence_balance_loss(part.flatten(0, 1), (2, part.shape[1]), 3, total=lambda counts: chosen.to(counts.dtype))
        for part in parts
    ]
    torch.testing.assert_close(sum(losses), whole)
    (expected,), (found,) = torch.autograd.grad(whole, scores), torch.autograd.grad(sum(losses), scores)
    torch.testing.assert_close(found, expected)


def test_sequence_loss_is_taken_from_unbiased_scores(tiny, ids):
    """The gate bias moves the experts chosen, never the first layer's loss."""
    losses, chosen = [], []
    for offset in (0.0, 5.0):
        model = tiny("v3")
        for _, bias in model.gate_biases():
            bias[::2] += offset
        with torch.no_grad():
            routing = model.trunk(ids(2, 30)).routing[0]
        losses.append(sequence_balance_loss(routing.scores_NE, routing.shape_BT, 4).item())
        chosen.append(routing.indices_NK)
    assert losses[0] == losses[1]
    assert not torch.equal(*chosen)


def test_sequence_loss_counts_equals_by_lowest_index():
    scores = torch.full((4, 300), 0.5)
    assert torch.equal(stable_top_k(scores, 2), torch.tensor([[0, 1]] * 4))
    assert float(sequence_balance_loss(scores, (1, 4), 2)) == pytest.approx(1.0)


def test_sequence_loss_survives_scores_that_all_underflow():
    scores = torch.zeros(4, 8, requires_grad=True)
    loss = sequence_balance_loss(scores, (1, 4), 2)
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_bias_update_by_hand():
    """Mean load 10: under it up by γ, over it down by γ, at it still; however far."""
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0])
    update_gate_bias_(bias, torch.tensor([9, 20, 10, 1]), speed=0.125)
    assert bias.tolist() == [0.625, -0.375, 0.0, 1.125]
    update_gate_bias_(bias, torch.tensor([0, 0, 0, 40]), speed=0.0)
    assert bias.tolist() == [0.625, -0.375, 0.0, 1.125]


def test_bias_update_is_exact_at_the_size_of_the_published_run():
    """2²⁴ tokens and more an expert: in fp32 the mean is rounded and one token's difference vanishes."""
    load = 2**25 + 1
    counts = torch.full((256,), load)
    counts[0], counts[1] = load - 1, load + 1
    bias = torch.zeros(256)
    update_gate_bias_(bias, counts, speed=1.0)
    assert bias[0] == 1
    assert bias[1] == -1
    assert (bias[2:] == 0).all()


def test_bias_updates_bring_a_lopsided_gate_into_balance():
    """Two experts take nearly everything; after some steps the load is even, and the bias stays within bounds."""
    from types import SimpleNamespace

    config = SimpleNamespace(
        scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=1.0,
        n_group=1, topk_group=1, num_experts_per_tok=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    lean = torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0])
    bias = torch.zeros(8)
    history = []
    for _ in range(300):
        logits = torch.randn(512, 8, generator=generator) + lean
        counts = expert_counts(route(logits, bias, config)[0], 8)
        history.append((max_violation(counts), int(counts[0])))
        update_gate_bias_(bias, counts, speed=0.005)
    assert history[0][0] > 2
    assert max(violation for violation, _ in history[-20:]) < 0.4
    assert history[-1][1] < history[0][1] / 2
    assert bias[0] < bias[1] < bias[6]
    assert bias.abs().max() < 1


def test_max_violation():
    assert max_violation(torch.tensor([5, 5, 5, 5])) == 0
    assert max_violation(torch.tensor([2, 6, 2, 2])) == pytest.approx(1.0)
    assert max_violation(torch.tensor([8, 0, 0, 0])) == pytest.approx(3.0)


@pytest.mark.parametrize("kind", ["v2", "v3"])
def test_recompute_changes_nothing_and_routes_once(kind, tiny, ids):
    outcomes = []
    for recompute in (False, True):
        model = tiny(kind, num_nextn_predict_layers=2)
        out = model.trunk(ids(2, 30), recompute=recompute)
        loss = sum((hidden.square().mean() for hidden in out.mtp_hidden), out.hidden_BTD.abs().mean())
        for routing in out.routing:
            loss = loss + sequence_balance_loss(routing.scores_NE, routing.shape_BT, 4)
        loss.backward()
        outcomes.append((out, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (plain, gradients), (again, gradients_again) = outcomes
    assert torch.equal(plain.hidden_BTD, again.hidden_BTD)
    assert all(torch.equal(a, b) for a, b in zip(plain.mtp_hidden, again.mtp_hidden, strict=True))
    assert [r.layer_index for r in again.routing] == [1, 2, 3, 4]
    assert [r.shape_BT for r in again.routing] == [(2, 30), (2, 30), (2, 29), (2, 28)]
    for a, b in zip(plain.routing, again.routing, strict=True):
        assert torch.equal(a.indices_NK, b.indices_NK)
    for name, gradient in gradients.items():
        assert (gradient is None) == (gradients_again[name] is None), name
        assert gradient is None or torch.equal(gradient, gradients_again[name]), name
    untouched = [name for name, gradient in gradients.items() if gradient is None]
    assert untouched == ["lm_head.weight"]  # `trunk` ends before the head


def test_recompute_keeps_less(tiny, ids):
    """Bytes that autograd saves in the forward: only each layer's input stays."""

    def saved_bytes(recompute):
        model, total = tiny("v3", num_hidden_layers=6), 0

        def count(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.trunk(ids(4, 64), recompute=recompute)
        return total

    assert saved_bytes(True) < saved_bytes(False) / 5
