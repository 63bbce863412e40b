"""A decoder shared out over gloo ranks against one process: losses, gradients, their norm, steps, and the shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fireflyer.config import load_config
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.parallel import shard
from fireflyer.parallel.layout import Layout
from fireflyer.parallel.ranks import Alone, Many
from fireflyer.parallel.ranks import Ranks as Peers
from fireflyer.train.losses import training_losses
from fireflyer.train.optimizer import DecoderOptimizer, clip_gradients
from fireflyer.train.settings import OptimizerSettings
from tests.gloo_ranks import Ranks

ROWS, MICRO, STEPS = 8, 2, 3
LAYOUTS = [Layout(dp=4, zero=1), Layout(dp=4, ep=2, zero=2), Layout(dp=4, ep=4, zero=3), Layout(dp=4, ep=2, zero=1)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass(frozen=True)
class Seen:
    """Of every step: the loss and the norm; of the first the gradients; at the end the weights, and what was said."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    notes: dict[str, Any]


SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
    "topk_group": 2, "num_nextn_predict_layers": 1, "initializer_range": 0.2, "quantization_config": None,
    "rope_scaling": None,
}  # fmt: skip


def new_model(dtype: torch.dtype) -> Decoder:
    model = Decoder(load_config("deepseek-v3").replace(**SHAPE))
    init_weights_(model, torch.Generator().manual_seed(5))
    return model.to(dtype)


def parts(model: Decoder, share: slice) -> Iterator[tuple[Tensor, bool]]:
    ids = torch.randint(0, 50, (ROWS, 13), generator=torch.Generator().manual_seed(6))
    labels = ids[:, 1:].masked_fill(torch.rand(ROWS, 12, generator=torch.Generator().manual_seed(7)) < 0.3, -100)
    own, own_labels = ids[share, :-1], labels[share]
    for start in range(0, len(own), MICRO):
        terms = training_losses(
            model.trunk(own[start : start + MICRO]), model.head_weight, own_labels[start : start + MICRO], None,
            num_experts_per_tok=model.config.num_experts_per_tok, valid_in_batch=int((labels != -100).sum()),
            rows_in_batch=ROWS,
        )  # fmt: skip
        yield terms.total(0.3, 0.05), start + MICRO >= len(own)


def trained(layout: Layout, dtype: torch.dtype) -> Seen:
    """A few steps of this rank, with forward passes that no backward follows in between."""
    ranks: Peers = Alone() if layout.world == 1 else Many(layout, "cpu")
    model = new_model(dtype)
    if isinstance(ranks, Many):
        shard.shard_(model, ranks, [model])
    named = dict(model.named_parameters())
    optimizer = DecoderOptimizer(model, OptimizerSettings())
    losses, norms, first = [], [], {}
    for _ in range(STEPS):
        loss = 0.0
        for part, last in parts(model, ranks.share(ROWS)):
            shard.before_backward(model, layout.zero, last)
            part.backward()
            loss += part.item()
        losses.append(ranks.summed({"loss": loss})["loss"])
        norms.append(clip_gradients(named.values(), 1.0, ranks))
        first = first or {n: whole(n, p.grad, ranks).clone() for n, p in named.items() if p.grad is not None}
        optimizer.step(1e-2)
        optimizer.zero_grad()
        with torch.no_grad():
            sum(float(part) for part, _ in parts(model, ranks.share(ROWS)))
        shard.settle(model)
    weights = {name: whole(name, parameter.detach(), ranks) for name, parameter in named.items()}
    notes: dict[str, Any] = {"held": sum(ranks.local(p).numel() for p in named.values())}
    if isinstance(ranks, Many):
        notes["shares"] = all(
            torch.equal(shard.share_of(name, full, ranks), ranks.local(named[name].detach()))
            for name, full in weights.items()
        )
    return Seen(losses, norms, first, weights, notes)


def whole(name: str, tensor: Tensor, ranks: Peers) -> Tensor:
    return tensor if isinstance(ranks, Alone) else shard.whole(name, tensor, ranks)


def told(rank_error: int | None) -> tuple[bool, str, str]:
    """What each rank learns of the others: a flag of one, an error of one, fingerprints that differ."""
    ranks = Many(Layout(dp=4), "cpu")
    flag = ranks.any(ranks.rank == 2)
    errors = []
    for act in (
        lambda: ranks.first(UserErrorOf(ranks.rank) if ranks.rank == rank_error else None),
        lambda: ranks.same({"recipe": "a", "data": "b" if ranks.rank != 3 else "c"}),
    ):
        try:
            act()
            errors.append("")
        except Exception as error:
            errors.append(str(error))
    return flag, errors[0], errors[1]


def UserErrorOf(rank: int) -> Any:
    from fireflyer.errors import UserError

    return UserError(f"no file on {rank}")


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"dp{layout.dp}-ep{layout.ep}-zero{layout.zero}")
def test_four_ranks_come_to_what_one_comes_to(four: Ranks, layout: Layout, dtype: torch.dtype) -> None:
    expected = trained(Layout(), dtype)
    seen = four.run(trained, layout, dtype)
    near = TOLERANCE[dtype]
    for found in seen:
        assert found.losses == pytest.approx(expected.losses, rel=near)
        assert found.norms == pytest.approx(expected.norms, rel=near)
        for mine, theirs, steps in (
            (found.gradients, expected.gradients, 1),
            (found.weights, expected.weights, 10 * STEPS),  # AdamW's first steps divide by the gradient itself
        ):
            assert mine.keys() == theirs.keys()
            for name, tensor in theirs.items():
                assert mine[name].dtype == dtype
                assert float((mine[name] - tensor).norm()) <= steps * near * float(tensor.norm()), name
        assert found.notes["shares"]
    held = sum(found.notes["held"] for found in seen)
    assert held == expected.notes["held"]  # every number lies on one rank


def test_one_flag_one_error_and_other_files_are_known_to_all(four: Ranks) -> None:
    for flag, error, difference in four.run(told, 1):
        assert flag
        assert error == "rank 1: no file on 1"
        assert "rank 3 has another data than rank 0" in difference
    assert [error for _, error, _ in four.run(told, None)] == [""] * 4
