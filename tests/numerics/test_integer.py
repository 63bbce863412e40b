"""INT8 and INT4 against loops that read the layout byte by byte, and against what the formats promise."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.numerics.integer import (
    Kind,
    PackedShape,
    expert_shapes,
    integer_linear,
    integers,
    pack,
    pack_expert,
    quantize_rows,
    unpack,
)

KINDS: tuple[Kind, ...] = ("int8", "int4")
SHAPES = [(1, 1), (16, 64), (17, 65), (33, 31), (40, 200), (5, 96)]


def read_naively(blob: bytes, kind: str, rows: int, cols: int) -> list[list[float]]:
    """The page's description, one weight at a time."""
    padded_rows, padded_cols = (rows + 15) // 16 * 16, (cols + 63) // 64 * 64
    codes_end = padded_rows * padded_cols // (1 if kind == "int8" else 2)
    groups_at = codes_end + 4 * padded_rows
    out = []
    for r in range(rows):
        (scale,) = struct.unpack_from("<f", blob, codes_end + 4 * r)
        strip, lane = divmod(r, 16)
        line = []
        for k in range(cols):
            if kind == "int8":
                value = blob[strip * 16 * padded_cols + k // 4 * 64 + lane * 4 + k % 4] - 128
            else:
                pair, inside = divmod(k, 64)
                half, inside = divmod(inside, 32)
                byte = blob[strip * 8 * padded_cols + pair * 512 + inside // 4 * 64 + lane * 4 + inside % 4]
                code = byte >> 4 if half else byte & 15
                both = blob[groups_at + (strip * padded_cols // 32 + k // 32) * 16 + lane]
                shift = (both >> 4) - (16 if both >= 128 else 0)
                value = (both & 15) * (code - 8 - shift)
            assert -127 <= value <= 127
            line.append(torch.tensor(scale) * value)
        out.append(line)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layout(kind: Kind, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    packed = pack(torch.randn(shape) ** 3, kind)
    want = torch.tensor(read_naively(packed.numpy().tobytes(), kind, *shape))
    assert torch.equal(unpack(packed, PackedShape(kind, *shape)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_the_nearest_step(dtype: torch.dtype) -> None:
    weight = torch.randn(35, 70).to(dtype)
    got = unpack(pack(weight, "int8"), PackedShape("int8", 35, 70))
    step = weight.float().abs().amax(1, keepdim=True) / 127
    assert ((got - weight.float()).abs() <= step * 0.5001).all()


def test_int4_is_finer_than_a_symmetric_group_of_32() -> None:
    """Beside the usual format (an fp16 scale a group, its largest at -8), which takes 4.5 bits a weight."""
    torch.manual_seed(2)
    for power in (1, 3):  # a normal distribution, and one with long tails
        weight = torch.randn(256, 1024) ** power
        blocks = weight.view(-1, 32)
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        scale = (largest / -8).half().float()
        usual = ((blocks / scale + 8.5).floor().clamp(0, 15) - 8) * scale
        ours = unpack(pack(weight, "int4"), PackedShape("int4", 256, 1024))
        assert (ours - weight).square().mean() < 0.9 * (usual.view_as(weight) - weight).square().mean()
    assert PackedShape("int4", 2048, 2048).num_bytes * 8 / 2048**2 < 4.27


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    cols=st.integers(1, 140),
    power=st.sampled_from([1, 5, 9]),
    size=st.sampled_from([1e-38, 1e-20, 1.0, 1e30]),
)
def test_integers_stay_in_range_and_repacking_changes_nothing(
    kind: Kind, seed: int, rows: int, cols: int, power: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) ** power
    weight = weight / weight.abs().max() * size
    shape = PackedShape(kind, rows, cols)
    packed = pack(weight, kind)
    values, scales = integers(packed, shape)
    assert values.abs().max() <= 127
    again = unpack(packed, shape)
    assert torch.equal(again, values * scales[:, None])
    if kind == "int8":
        assert torch.equal(integers(pack(again, kind), shape)[0], values)
    loss = (again - weight).abs().amax(1) / weight.abs().amax(1).clamp(min=1e-35)
    assert (loss <= (0.5001 / 127 if kind == "int8" else 17 / 120)).all() or size < 1e-35


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_one_outlier_and_groups_on_one_side_of_zero(kind: Kind) -> None:
    weight = torch.zeros(5, 130)
    weight[1, 7], weight[2, 129], weight[3], weight[4] = 5.0, -1e-3, 7.0, -7.0
    got = unpack(pack(weight, kind), PackedShape(kind, 5, 130))
    torch.testing.assert_close(got, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_large_weights_are_packed_in_chunks_to_the_same_bytes(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(70, 100)
    whole = pack(weight, kind)
    monkeypatch.setattr("fireflyer.numerics.integer._CHUNK", 16 * 128)
    assert torch.equal(pack(weight, kind), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_is_one_block(kind: Kind) -> None:
    gate, up, down = torch.randn(20, 48), torch.randn(20, 48), torch.randn(48, 20)
    block = pack_expert(gate, up, down, kind)
    start = 0
    for weight, shape in zip((gate, up, down), expert_shapes(kind, hidden=48, width=20), strict=True):
        assert start % 64 == 0
        part = block[start : start + shape.num_bytes]
        assert torch.equal(part, pack(weight, kind))
        assert (unpack(part, shape) - weight).abs().max() < 0.5
        start += shape.num_bytes
    assert start == block.numel()


def test_a_block_may_begin_at_any_byte() -> None:
    packed = pack(torch.randn(5, 9), "int4")
    moved = torch.cat([torch.zeros(3, dtype=torch.uint8), packed])[3:]
    assert torch.equal(unpack(moved, PackedShape("int4", 5, 9)), unpack(packed, PackedShape("int4", 5, 9)))


@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_of_the_integers(kind: Kind) -> None:
    weight, x = torch.randn(37, 100), torch.randn(6, 100)
    values, scales = integers(pack(weight, kind), PackedShape(kind, 37, 100))
    rounded, x_scales = quantize_rows(x)
    exact = (rounded.double() @ values.double().T) * x_scales.double()[:, None] * scales.double()
    torch.testing.assert_close(integer_linear(x, values, scales).double(), exact, rtol=1e-6, atol=0)


def test_rows_that_are_not_finite_are_lost_alone() -> None:
    x = torch.randn(5, 64)
    x[1, 3], x[2, 4], x[3] = float("nan"), float("-inf"), 0
    rounded, scales = quantize_rows(x)
    assert scales.isnan().tolist() == [False, True, True, False, False]
    assert scales[3] == 0
    assert not rounded[1:4].any()
    assert rounded.abs().amax(1).tolist() == [127, 0, 0, 0, 127]
    y = integer_linear(x, torch.ones(4, 64, dtype=torch.int8), torch.ones(4))
    assert y.isnan().all(1).tolist() == [False, True, True, False, False]
    assert not y[3].any()


@pytest.mark.parametrize(
    "bad", [torch.ones(3), torch.ones(2, 2, dtype=torch.int8), torch.tensor([[float("nan"), 1.0]])]
)
def test_what_cannot_be_packed_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"float matrix|NaN"):
        pack(bad, "int8")


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="65536"):
        PackedShape("int8", 4, 65537)
    with pytest.raises(ValueError, match="3×5 in int4 is 640 bytes"):
        unpack(torch.zeros(100, dtype=torch.uint8), PackedShape("int4", 3, 5))
