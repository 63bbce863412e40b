"""The narrow accumulator against whole-number arithmetic in Python, one result at a time."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from fireflyer.numerics.accumulate import Accumulator, narrow_product


def cut(value: Fraction, unit: Fraction) -> Fraction:
    """To a multiple of `unit`, towards zero."""
    count = abs(value) // unit
    return unit * count if value >= 0 else -unit * count


def unit_of(largest: Fraction, bits: int) -> Fraction:
    if largest == 0:
        return Fraction(1)
    exponent = 0
    while Fraction(2) ** exponent <= largest:
        exponent += 1
    while Fraction(2) ** (exponent - 1) > largest:
        exponent -= 1
    return Fraction(2) ** (exponent - bits)


def one_result(a: list[Fraction], b: list[Fraction], accumulator: Accumulator) -> float:
    narrow = total = Fraction(0)
    wide = torch.zeros(())  # the fp32 sum rounds as fp32 does
    for start in range(0, len(a), accumulator.instruction):
        terms = [x * y for x, y in zip(a[start:][: accumulator.instruction], b[start:], strict=False)] + [narrow]
        unit = unit_of(max(map(abs, terms)), accumulator.bits)
        narrow = sum((cut(term, unit) for term in terms), Fraction(0))
        narrow = cut(narrow, unit_of(abs(narrow), accumulator.bits))
        done = start + accumulator.instruction
        if accumulator.promoted_every and done % accumulator.promoted_every == 0:
            wide, narrow = wide + float(narrow), Fraction(0)
    return float(wide + float(narrow + total))


@pytest.mark.parametrize("promoted_every", [None, 32, 128])
@pytest.mark.parametrize("bits", [4, 14])
def test_it_sums_as_whole_numbers_do(bits: int, promoted_every: int | None):
    generator = torch.Generator().manual_seed(bits)
    a, b = (torch.randn(rows, 256, generator=generator).mul(8).to(torch.float8_e4m3fn).float() for rows in (3, 4))
    a[0, :64] = 0
    accumulator = Accumulator(bits, 32, promoted_every)
    found = narrow_product(a, b, accumulator)
    for i in range(3):
        for j in range(4):
            rows = ([Fraction(x) for x in row.tolist()] for row in (a[i], b[j]))
            assert float(found[i, j]) == one_result(*rows, accumulator)


def test_fourteen_bits_lose_what_promotion_keeps():
    """Report 3.3.2: an inner axis of 4,096, an error of nearly 2%, gone with promotion every 128."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 4096, generator=generator).mul(64).to(torch.float8_e4m3fn).float() for _ in range(2))
    exact = a.double() @ b.double().T
    spread = exact.square().mean().sqrt()

    def worst(accumulator: Accumulator) -> float:
        return float((narrow_product(a, b, accumulator) - exact).abs().max() / spread)

    assert 0.01 < worst(Accumulator()) < 0.03
    assert worst(Accumulator(promoted_every=128)) < 0.001
    assert worst(Accumulator(bits=24)) < 1e-4


def test_enough_bits_are_exact():
    a, b = (torch.randint(-8, 9, (5, 96), generator=torch.Generator().manual_seed(1)).float() for _ in range(2))
    assert torch.equal(narrow_product(a, b, Accumulator(bits=24)), a @ b.T)
