"""The native int8 and int4 products: bit-equal to torch at each level of this CPU, in every shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fireflyer.numerics.integer import Kind, PackedShape, integer_linear, integers, pack
from fireflyer.numerics.native.library import Library, packed_matrix

KINDS: tuple[Kind, ...] = ("int8", "int4")


def filled(shape: PackedShape, code: int, group: int) -> Tensor:
    """A block with the same byte everywhere: weights at the ends of their range."""
    packed = torch.full((shape.num_bytes,), code, dtype=torch.uint8)
    packed[shape.scales_at : shape.groups_at].view(torch.float32).fill_(0.5)
    packed[shape.groups_at :] = group
    return packed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (37, 131), (16, 64), (33, 40), (144, 200), (8, 1030)])
def test_product_is_torchs_to_the_bit(native: Library, kind: Kind, rows: int, cols: int) -> None:
    torch.manual_seed(rows + cols)
    shape = PackedShape(kind, rows, cols)
    packed = pack(torch.randn(rows, cols) ** 3, kind)
    values, scales = integers(packed, shape)
    for m in (0, 1, 2, 3, 4, 5, 8, 11, 12, 13, 16, 17, 20, 32, 33, 49):
        x = torch.randn(m, cols + 3)[:, 1 : cols + 1] * 10 ** torch.randn(m, 1)
        assert torch.equal(native.linear(x, packed_matrix(packed, shape)), integer_linear(x, values, scales)), m


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 3, 6, 40])
def test_the_largest_numbers_overflow_nothing(native: Library, kind: Kind, m: int) -> None:
    """Codes at both ends by activations at both ends, over many inputs; the total alone may be large."""
    shape = PackedShape(kind, 18, 20000 if kind == "int8" else 5000)
    ends = [(255, 0), (1, 0)] if kind == "int8" else [(0xFF, 0x88), (0x00, 0x88), (0xFF, 0x7F), (0x00, 0x0F)]
    for code, group in ends:  # int4: steps of 8 and 15, codes of 15 and 0, zeros of 0, 15 and 8
        packed = filled(shape, code, group)
        values, scales = integers(packed, shape)
        for x in (torch.ones(m, shape.cols), -torch.ones(m, shape.cols)):
            assert torch.equal(native.linear(x, packed_matrix(packed, shape)), integer_linear(x, values, scales))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 7, 200])
def test_neither_threads_nor_neighbours_matter(native: Library, kind: Kind, m: int) -> None:
    shape = PackedShape(kind, 530, 700)
    packed, x = pack(torch.randn(530, 700), kind), torch.randn(m, 700)
    matrix = packed_matrix(packed, shape)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.linear(x, matrix)
        assert torch.equal(native.linear(x[m // 2 :][:1], matrix)[0], alone[m // 2])
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(native.linear(x, matrix), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_finite_are_lost_alone(native: Library, kind: Kind) -> None:
    x = torch.randn(7, 70)
    x[1, 3], x[2, 69], x[3], x[4], x[5] = float("nan"), float("inf"), 0, 1e-38, 1e38
    packed, shape = pack(torch.randn(20, 70), kind), PackedShape(kind, 20, 70)
    got = native.linear(x, packed_matrix(packed, shape))
    assert got.isnan().all(1).tolist() == [False, True, True, False, False, False, False]
    assert not got[3:5].any()
    finite = [0, 3, 4, 5, 6]
    assert torch.equal(got[finite], integer_linear(x, *integers(packed, shape))[finite])


def test_tiles_live_beside_torchs_own() -> None:
    """Where the CPU has them, torch's bf16 products use the same tile registers on the same threads."""
    from fireflyer.numerics.native.library import library

    native = library()
    if native is None:
        pytest.skip("the native kernels are not built: make native")
    shape = PackedShape("int8", 64, 256)
    packed, x = pack(torch.randn(64, 256), "int8"), torch.randn(40, 256)
    narrow = torch.randn(64, 64).bfloat16()
    product, theirs = integer_linear(x, *integers(packed, shape)), narrow @ narrow
    for _ in range(20):
        assert torch.equal(native.linear(x, packed_matrix(packed, shape)), product)
        assert torch.equal(narrow @ narrow, theirs)
