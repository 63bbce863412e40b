"""What a tensor core with a narrow accumulator makes of an FP8 product: for study, not for training.

In: matrices whose products are exact in fp32, as e4m3's are. Out: what a Hopper card sums, with promotion or without.
A card's instruction adds 32 products to its accumulator. All are first shifted to the largest exponent among them, and
of each only the upper bits are kept, about 14 on an H800 (report 3.3.2 and 3.5.2); what is beyond is cut off. Promotion
adds the accumulator to an fp32 sum every so many products and begins it anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accumulator:
    """bits: of a magnitude, its leading one included. instruction: products added at once. promoted_every: products
    until the fp32 sum takes over, a multiple of `instruction`; None: only at the end."""

    bits: int = 14
    instruction: int = 32
    promoted_every: int | None = None


def narrow_product(a_MK: Tensor, b_NK: Tensor, accumulator: Accumulator) -> Tensor:
    """a · bᵀ as the accumulator sums it: (M, N) fp32. Takes M · N · instruction numbers of memory at a time.

    K must be a multiple of `instruction`. Bits are cut towards zero.
    """
    step, inner = accumulator.instruction, a_MK.shape[1]
    assert inner % step == 0, "the inner axis is whole instructions"
    every = accumulator.promoted_every or inner
    narrow = torch.zeros(a_MK.shape[0], b_NK.shape[0])
    total = torch.zeros_like(narrow)
    for start in range(0, inner, step):
        products_MNS = a_MK[:, None, start : start + step] * b_NK[None, :, start : start + step]
        terms = torch.cat((products_MNS, narrow[..., None]), dim=-1)
        unit = _last_bit(terms.abs().amax(-1), accumulator.bits)
        # Whole numbers of units, fewer than 2^(bits + 6): fp32 adds them exactly, in any order.
        narrow = terms.div_(unit[..., None]).trunc_().sum(-1).mul_(unit)
        unit = _last_bit(narrow.abs(), accumulator.bits)
        narrow = (narrow / unit).trunc_().mul_(unit)
        if (start + step) % every == 0:
            total += narrow
            narrow = torch.zeros_like(narrow)
    return total + narrow


def _last_bit(largest: Tensor, bits: int) -> Tensor:
    """What the last of so many bits is worth where `largest` has the first; 1 for zero."""
    exponent = torch.frexp(largest)[1]
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent - bits), 1.0)
