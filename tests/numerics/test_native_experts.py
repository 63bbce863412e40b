"""A layer's experts in one native call, against one expert after another in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.numerics.integer import Kind, expert_shapes, integer_linear, integers, pack_expert
from fireflyer.numerics.native.library import ExpertTable, Library

KINDS: tuple[Kind, ...] = ("int8", "int4")


def choose(tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Distinct experts for each token, crowded onto the first ones, and weights."""
    crowded = torch.rand(tokens, num_experts) * torch.linspace(2, 0.5, num_experts)
    return crowded.topk(top_k).indices.contiguous(), torch.rand(tokens, top_k)


def one_by_one(x: Tensor, indices: Tensor, weights: Tensor, experts: list[tuple[Tensor, ...]], product) -> Tensor:
    y = torch.zeros_like(x)
    for n in range(len(x)):
        for k in range(indices.shape[1]):
            gate, up, down = experts[indices[n, k]]
            wide = F.silu(product(x[n : n + 1], gate)) * product(x[n : n + 1], up)
            y[n] += weights[n, k] * product(wide, down)[0]
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (70, 33)])
def test_dense_experts(native: Library, dtype: torch.dtype, hidden: int, width: int) -> None:
    torch.manual_seed(hidden)
    gate_up, down = torch.randn(5, 2 * width, hidden).to(dtype), torch.randn(5, hidden, width).to(dtype)
    table = ExpertTable.dense(gate_up, down)
    experts = [(gate_up[e, :width], gate_up[e, width:], down[e]) for e in range(5)]
    for tokens in (0, 1, 2, 7, 40):
        x = torch.randn(tokens, hidden + 3)[:, :hidden]
        indices, weights = choose(tokens, 3, 5)
        want = one_by_one(x.double(), indices, weights.double(), experts, lambda a, w: F.linear(a, w.double()))
        got = native.experts(table, x, indices, weights)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * float(want.abs().max()) if tokens else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("hidden", "width"), [(64, 48), (140, 300)])
def test_packed_experts(native: Library, kind: Kind, hidden: int, width: int) -> None:
    torch.manual_seed(width)
    shapes = expert_shapes(kind, hidden, width)
    dense = [(torch.randn(width, hidden), torch.randn(width, hidden), torch.randn(hidden, width)) for _ in range(5)]
    packed = torch.stack([pack_expert(*expert, kind) for expert in dense])
    sizes = [shape.num_bytes for shape in shapes]
    experts = [tuple(integers(p, s) for p, s in zip(e.split(sizes), shapes, strict=True)) for e in packed]
    for tokens in (1, 2, 9, 60):
        x = torch.randn(tokens, hidden)
        indices, weights = choose(tokens, 3, 5)
        want = one_by_one(x, indices, weights, experts, lambda a, w: integer_linear(a, *w))
        got = native.experts(ExpertTable.stacked(packed, shapes), x, indices, weights)
        # A last digit of SwiGLU may round one activation to its neighbour: 1/127 of one term among `width`.
        assert (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_neither_threads_nor_other_tokens_nor_the_order_of_experts_matter(native: Library, kind: Kind) -> None:
    shapes = expert_shapes(kind, 96, 272)
    packed = torch.stack(
        [pack_expert(torch.randn(272, 96), torch.randn(272, 96), torch.randn(96, 272), kind) for _ in range(6)]
    )
    table, x = ExpertTable.stacked(packed, shapes), torch.randn(37, 96)
    indices, weights = choose(37, 4, 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = native.experts(table, x, indices, weights)
        for n in (0, 17, 36):
            alone = native.experts(table, x[n : n + 1], indices[n : n + 1], weights[n : n + 1])
            assert torch.equal(alone[0], whole[n])
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(native.experts(table, x, indices, weights), whole)
        rows = torch.full((37 * 4, 96), torch.nan)
        for held in ([5, 0], [3], [1, 4], [2]):
            moved = {e: packed[e].clone() for e in held}
            native.fill_rows(ExpertTable.some(6, moved, shapes), x, indices, rows)
        assert torch.equal(native.sum_rows(table, rows, indices, weights), whole)
    finally:
        torch.set_num_threads(before)


def test_a_row_that_is_not_finite_is_lost_alone(native: Library) -> None:
    shapes = expert_shapes("int4", 64, 64)
    packed = torch.stack([pack_expert(*(torch.randn(64, 64) for _ in range(3)), "int4") for _ in range(2)])
    x, indices = torch.randn(3, 64), torch.tensor([[0, 1], [1, 0], [0, 1]])
    x[1, 5] = float("nan")
    got = native.experts(ExpertTable.stacked(packed, shapes), x, indices, torch.ones(3, 2))
    assert got.isnan().all(1).tolist() == [False, True, False]


def test_swiglu_where_its_exponential_leaves_the_range(native: Library) -> None:
    """An expert of identities shows silu(x) · x itself."""
    eye = torch.eye(64)
    x = torch.linspace(-120, 120, 64)[None]
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-20, -1e-20])
    table = ExpertTable.dense(torch.cat([eye, eye])[None], eye[None])
    got = native.experts(table, x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    torch.testing.assert_close(got.double(), F.silu(x.double()) * x.double(), rtol=1e-6, atol=1e-33)
