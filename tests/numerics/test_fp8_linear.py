"""FP8 products against float64 sums over tiles of exact products; whole layers against the same, weight by weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fireflyer.numerics import fp8_matmul
from fireflyer.numerics.fp8_linear import linear_backward, linear_forward
from fireflyer.numerics.fp8_matmul import fp8_product, unavailable
from fireflyer.numerics.fp8_tiles import (
    BLOCK,
    COLUMN_TILE,
    ROW_TILE,
    BlockedWeights,
    Tile,
    Tiled,
    dequantize_tiles,
    quantize_tiles,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tile_by_tile(a: Tiled, b: Tiled) -> Tensor:
    """scale · scale · (sum of e4m3 products), one stretch of 128 after the other, in float64."""
    total = torch.zeros(a.values.shape[0], b.values.shape[0], dtype=torch.float64)
    for tile in range(a.scales.shape[1]):
        part = slice(128 * tile, 128 * tile + 128)
        exact = a.values[:, part].double() @ b.values[:, part].double().T
        scale_a = a.scales[:, tile].repeat_interleave(a.tile[0])[: len(exact)].double()
        scale_b = b.scales[:, tile].repeat_interleave(b.tile[0])[: exact.shape[1]].double()
        total += exact * scale_a[:, None] * scale_b
    return total


@pytest.mark.parametrize("tile", [ROW_TILE, BLOCK])
def test_a_product_is_the_sum_of_its_tiles(tile: Tile):
    a, b = quantize_tiles(drawn(70, 300), ROW_TILE), quantize_tiles(drawn(150, 300, seed=1), tile)
    expected = tile_by_tile(a, b)
    assert (fp8_product(a, b) - expected).abs().max() < 1e-5 * expected.abs().max()


def rounded(x: Tensor, tile: Tile, power_of_two: bool = False) -> Tensor:
    return dequantize_tiles(quantize_tiles(x, tile, power_of_two=power_of_two)).double()


@pytest.mark.parametrize("how", ["plain", "dispatched", "blocks"])
@pytest.mark.parametrize("half", [128, 72])
def test_three_products_of_a_stack(half: int, how: str):
    """Two matrices a weight, four weights of which one has no rows; 72 rows are no whole blocks."""
    spans = [(0, 130), (130, 130), (130, 150), (150, 281)]
    x, weight, grad = drawn(281, 160), drawn(4, 2 * half, 160, seed=1), drawn(281, 2 * half, seed=2)
    weights = BlockedWeights.quantize(weight, matrices=2)
    y = linear_forward(quantize_tiles(x, ROW_TILE), weights, spans, 2 * half)
    tile, two = (BLOCK if how == "blocks" else ROW_TILE), how == "dispatched"
    grad_x, grad_weight = linear_backward(
        grad,
        weights,
        weight.shape,
        spans,
        lambda start, stop: quantize_tiles(x[start:stop], COLUMN_TILE),
        gradient_tile=tile,
        dispatched=two,
    )
    for index, (start, stop) in enumerate(spans):
        own = x[start:stop]
        sums = torch.zeros(stop - start, 160, dtype=torch.float64)
        for part in (slice(0, half), slice(half, 2 * half)) if stop > start else ():
            matrix, own_grad = rounded(weight[index, part], BLOCK), grad[start:stop, part]
            torch.testing.assert_close(
                y[start:stop, part].double(), rounded(own, ROW_TILE) @ matrix.T, rtol=0, atol=1e-4
            )
            by_rows = rounded(own_grad, tile, two)
            by_columns = by_rows if how == "blocks" else rounded(own_grad, COLUMN_TILE)
            by_columns = rounded(by_rows.float(), COLUMN_TILE, True) if two else by_columns
            sums += by_rows @ matrix
            expected = by_columns.T @ rounded(own, COLUMN_TILE)
            torch.testing.assert_close(grad_weight[index, part].double(), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(grad_x[start:stop].double(), sums, rtol=0, atol=1e-4)
    assert not grad_weight[1].any()


def test_where_fp8_can_run(monkeypatch: pytest.MonkeyPatch):
    assert unavailable("cpu") is None
    assert unavailable("mps") == "mps has no FP8 products"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert unavailable("cuda:0") == "A100 has compute capability 8.0, block-wise FP8 needs 9.0 (Hopper)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def refuses(device: torch.device) -> float:
        raise RuntimeError("Invalid scaling configuration.\nMore.")

    monkeypatch.setattr(fp8_matmul, "_disagreement", refuses)
    reason = unavailable("cuda")
    assert reason is not None
    assert reason.endswith("(Invalid scaling configuration.)")
    monkeypatch.setattr(fp8_matmul, "_disagreement", lambda device: 0.25)
    assert unavailable("cuda") == "torch's FP8 product on A100 is off by 25.0% of its largest result"
    monkeypatch.setattr(fp8_matmul, "_disagreement", lambda device: 0.002)
    assert unavailable("cuda") is None


def test_the_trial_of_a_card_agrees_with_the_emulation_on_a_cpu():
    assert fp8_matmul._disagreement(torch.device("cpu")) == 0
