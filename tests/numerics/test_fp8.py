"""Block FP8 against naive loops, a hand-worked block, and the edges where other code has gone wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.numerics.fp8 import dequantize_block, quantize_block, scale_shape

E4M3_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3_VALUES = E4M3_VALUES[~E4M3_VALUES.isnan()]


def naive_dequantize(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            out[row, column] = weight[row, column].float() * scale_inv[row // block[0], column // block[1]]
    return out


def naive_scales(weight: torch.Tensor, block: tuple[int, int]) -> list[list[float]]:
    rows, columns = weight.shape
    return [
        [
            weight[top : top + block[0], left : left + block[1]].abs().max().item() / 448
            for left in range(0, columns, block[1])
        ]
        for top in range(0, rows, block[0])
    ]


@pytest.mark.parametrize("shape", [(4, 6), (9, 5), (1, 1), (8, 8), (7, 17)])
@pytest.mark.parametrize("block", [(4, 4), (3, 5), (128, 128), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_is_the_loop_to_the_byte(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[0] * 31 + block[0])
    weight = torch.randn(shape, generator=generator).mul(50).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(scale_shape(shape, block), generator=generator).mul(1e-3)
    expected = naive_dequantize(weight, scale_inv, block).to(dtype)
    assert torch.equal(dequantize_block(weight, scale_inv, block, dtype), expected)


def test_hand_worked_block() -> None:
    # Two columns of blocks of 2 x 2, the lower and right ones cut short. Left block: amax 896, so scale 2:
    # 896 / 2 = 448, -3 / 2 = -1.5, 1 / 2 = 0.5, 33 / 2 = 16.5, which lies between 16 and 18 and nearer to 16
    # (three mantissa bits). Upper right: amax 448, scale 1. Lower left: amax 7, scale 1/64: 7 x 64 = 448, 0.
    # Lower right: all zero, scale 1.
    weight = torch.tensor([[896.0, -3.0, 448.0], [1.0, 33.0, 5.0], [7.0, 0.0, 0.0]])
    quantized, scale_inv = quantize_block(weight, (2, 2))
    assert scale_inv.tolist() == [[2.0, 1.0], [0.015625, 1.0]]
    assert quantized.float().tolist() == [[448.0, -1.5, 448.0], [0.5, 16.0, 5.0], [448.0, 0.0, 0.0]]
    assert dequantize_block(quantized, scale_inv, (2, 2)).tolist() == [
        [896.0, -3.0, 448.0],
        [1.0, 32.0, 5.0],
        [7, 0, 0],
    ]


def test_the_published_576_rows() -> None:
    # kv_a_proj_with_mqa of V3: 576 rows, so the fifth row of scales covers half a block.
    assert scale_shape((576, 7168)) == (5, 56)
    weight = torch.randn(576, 130, generator=torch.Generator().manual_seed(0))
    weight[:512] *= 100
    quantized, scale_inv = quantize_block(weight)
    assert scale_inv.shape == (5, 2)
    torch.testing.assert_close(scale_inv, torch.tensor(naive_scales(weight, (128, 128))), rtol=1e-6, atol=0)
    error = (dequantize_block(quantized, scale_inv) - weight).abs()
    # Half a step of three mantissa bits, or of the smallest subnormal 2^-9 times the scale.
    bound = torch.maximum(weight.abs() / 16, naive_dequantize_ones(scale_inv, weight.shape) * 2**-10)
    assert (error <= bound * 1.0001).all()


def naive_dequantize_ones(scale_inv: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows = torch.arange(shape[0])[:, None] // 128
    return scale_inv[rows, torch.arange(shape[1])[None, :] // 128]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    exponent=st.integers(-149, 120),
    seed=st.integers(0, 1000),
)
def test_quantize_takes_the_nearest_value_at_every_magnitude(
    rows: int, columns: int, block: tuple[int, int], exponent: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.tensor(2.0) ** exponent
    weight[0] = 0.0
    quantized, scale_inv = quantize_block(weight, block)
    assert torch.isfinite(scale_inv).all()
    assert (scale_inv > 0).all()
    assert not quantized.float().isnan().any()
    for row in range(rows):
        for column in range(columns):
            scaled = weight[row, column] / scale_inv[row // block[0], column // block[1]]
            distances = (E4M3_VALUES - scaled).abs()
            assert (quantized[row, column].float() - scaled).abs() == distances.min()


def test_quantized_values_survive_a_second_round() -> None:
    generator = torch.Generator().manual_seed(3)
    quantized, scale_inv = quantize_block(torch.randn(40, 24, generator=generator), (16, 16))
    again, scale_again = quantize_block(dequantize_block(quantized, scale_inv, (16, 16)), (16, 16))
    assert torch.equal(again.view(torch.uint8), quantized.view(torch.uint8))
    torch.testing.assert_close(scale_again, scale_inv, rtol=2e-7, atol=0)


def test_zeros_and_nan() -> None:
    quantized, scale_inv = quantize_block(torch.zeros(3, 3), (2, 2))
    assert scale_inv.eq(1).all()
    assert quantized.float().eq(0).all()
    quantized, _ = quantize_block(torch.tensor([[math.nan, 1.0, 2.0]]), (1, 1))
    assert quantized.float().isnan().tolist() == [[True, False, False]]


def test_misfits_are_refused_with_both_shapes() -> None:
    weight = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\(4, 4\) in blocks of \(2, 2\) needs float32 scales of \(2, 2\).*\(1, 2\)"):
        dequantize_block(weight, torch.ones(1, 2), (2, 2))
    with pytest.raises(ValueError, match="bfloat16"):
        dequantize_block(weight, torch.ones(2, 2, dtype=torch.bfloat16), (2, 2))
    with pytest.raises(ValueError, match="float8_e4m3fn matrix"):
        dequantize_block(torch.zeros(4, 4), torch.ones(2, 2), (2, 2))
    with pytest.raises(ValueError, match="float matrix"):
        quantize_block(torch.zeros(4, 4, dtype=torch.int64))
