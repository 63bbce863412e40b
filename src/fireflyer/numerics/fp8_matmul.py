"""One product of two e4m3 matrices with tile scales: a · bᵀ, summed in fp32 from one 128 of the inner axis to the next.

In: `Tiled` (M, K) and (N, K), whose tiles are 128 long along K. Out: (M, N) fp32 on a CPU, bf16 on a card. All three
products of a linear layer are of this form (report 3.3.2).

On a CPU it is emulated: e4m3 times e4m3 is exact in fp32, so fp32 products of the dequantised matrices differ from the
card's by the order of sums alone. On a card from SM90 on it is torch's block-wise scaled_mm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.numerics.fp8_tiles import (
    BLOCK,
    COLUMN_TILE,
    ROW_TILE,
    TILE,
    Tile,
    Tiled,
    dequantize_tiles,
    quantize_tiles,
)

FIRST_CAPABILITY = (9, 0)
_AGREEMENT = 0.01
"""Of a card's product with the emulation, relative to the largest result: bf16's rounding, and no more."""


def fp8_product(a: Tiled, b: Tiled) -> Tensor:
    """a · bᵀ: (M, K) by (N, K) gives (M, N)."""
    if a.values.device.type == "cuda":
        return _on_card(a, b)
    with torch.autocast(a.values.device.type, enabled=False):
        return F.linear(dequantize_tiles(a), dequantize_tiles(b))


def unavailable(device: str) -> str | None:
    """Why FP8 products can't run on a device ("cpu", "cuda:1", "mps"); None where they can.

    A card's three products are tried against the emulation, so that one that computes something else isn't used.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return None
    if kind != "cuda":
        return f"{kind} has no FP8 products"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return f"{name} has compute capability {capability[0]}.{capability[1]}, block-wise FP8 needs 9.0 (Hopper)"
    try:
        off = _disagreement(torch.device(device))
    except (RuntimeError, AttributeError, NotImplementedError, ValueError) as error:
        return f"torch {torch.__version__} has no block-wise FP8 product for {name} ({str(error).splitlines()[0]})"
    return None if off < _AGREEMENT else f"torch's FP8 product on {name} is off by {off:.1%} of its largest result"


def _disagreement(device: torch.device) -> float:
    """The largest difference of the three products of a small layer from their emulation, as a share."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, generator=generator) for shape in ((2 * TILE, 3 * TILE), (TILE, 3 * TILE), (2 * TILE, TILE))
    )
    pairs = (
        (quantize_tiles(x, ROW_TILE), quantize_tiles(weight, BLOCK)),
        (quantize_tiles(grad, ROW_TILE), quantize_tiles(weight, BLOCK).t()),
        (quantize_tiles(grad, COLUMN_TILE).t(), quantize_tiles(x, COLUMN_TILE).t()),
    )
    worst = 0.0
    for a, b in pairs:
        expected = fp8_product(a, b)
        moved = (Tiled(t.values.to(device), t.scales.to(device), t.tile) for t in (a, b))
        worst = max(worst, float((fp8_product(*moved).cpu() - expected).abs().max() / expected.abs().max()))
    return worst


def _on_card(a: Tiled, b: Tiled) -> Tensor:
    """torch's scaled_mm. Rows are filled up to whole tiles, as a card's product must be of whole 16 bytes."""
    kinds = {ROW_TILE: F.ScalingType.BlockWise1x128, BLOCK: F.ScalingType.BlockWise128x128}
    (values_a, scales_a), (values_b, scales_b) = _whole(a), _whole(b)
    out = F.scaled_mm(
        values_a,
        values_b.t(),
        _as_card_reads(scales_a, a.tile),
        kinds[a.tile],
        _as_card_reads(scales_b, b.tile),
        kinds[b.tile],
        output_dtype=torch.bfloat16,
    )
    return out[: a.values.shape[0], : b.values.shape[0]]


def _whole(tiled: Tiled) -> tuple[Tensor, Tensor]:
    """Values and scales of whole tiles in both directions, row by row in memory."""
    rows, columns = tiled.values.shape
    values, scales = tiled.values.contiguous(), tiled.scales
    if rows % TILE or columns % TILE:
        values = F.pad(values.view(torch.uint8), (0, -columns % TILE, 0, -rows % TILE)).view(torch.float8_e4m3fn)
    if tiled.tile == ROW_TILE and rows % TILE:
        scales = F.pad(scales, (0, 0, 0, -rows % TILE), value=1.0)
    return values, scales


def _as_card_reads(scales: Tensor, tile: Tile) -> Tensor:
    """1 x 128 scales column by column; 128 x 128 scales transposed, filled up to four along the inner axis."""
    if tile == ROW_TILE:
        return scales.t().contiguous().t()
    return F.pad(scales, (0, -scales.shape[1] % 4)).contiguous().t()
