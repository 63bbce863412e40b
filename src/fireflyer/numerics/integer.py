"""INT8 and INT4 weights with INT8 activations: what they mean, how they lie in memory, and the same product in torch.

A weight (rows outputs, cols inputs) becomes integers of -127..127 and one fp32 scale a row; both formats mean exactly
that, and INT4 is a shorter spelling of some of those integers. So every product is exact integer arithmetic until its
last step, and comes out the same to the bit whichever code computes it:

    y[m, r] = float(Σ_k q[m, k] · v[r, k]) · (x_scale[m] · scale[r])

- `int8`: v itself, 8 bits. Symmetric, scale = max|w| / 127 of the row: 8.0 bits a weight and 4 bytes a row.
- `int4`: v = step · (code - zero): a 4-bit code a weight, and for each group of 32 inputs one byte that holds a step of
  1..15 and a zero of 0..15. 4.25 bits a weight.

Activations: one scale a row (token), symmetric, max|x| / 127; a row with NaN or infinity gives NaN, in that row alone.

Packed, one matrix is one block of bytes, laid out for the kernels of native/ on every CPU, so that a file of it can be
mapped and used in place. Rows are padded to 16, inputs to 64, with weights of 0:

    codes   a strip for each 16 rows; in it, for each 4 inputs, 16 rows × 4 bytes.
            int8: v + 128. int4: inputs in pairs of groups; low half the first group's code, high half the second's
    scales  fp32, one a row
    groups  int4 alone: a strip for each 16 rows; in it, for each group, 16 bytes: (zero - 8) << 4 | step

Codes and scales begin at multiples of 64 bytes from the block's start, and a block's size is one, so blocks may follow
one another: an expert is gate, up and down in a row (`pack_expert`), to be moved or paged as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["int8", "int4"]

STRIP = 16
"""Output rows that lie together."""
GROUP = 32
"""Inputs that share a step and a zero in int4."""
MAX_COLS = 65536
"""The most inputs whose products fit an int32: 255 · 127 · 65536 < 2^31."""

_CHUNK = 1 << 17  # weights quantised at a time: what stays in a core's cache
_SMALLEST = 1e-35  # rows below it count as zeros: 127 over a lesser maximum could overflow


@dataclass(frozen=True)
class PackedShape:
    """A packed matrix without its bytes: what is needed beside them to read it."""

    kind: Kind
    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.kind not in ("int8", "int4"):
            raise ValueError(f"unknown integer format {self.kind!r}: expected int8 or int4")
        if self.rows < 1 or not 1 <= self.cols <= MAX_COLS:
            raise ValueError(
                f"a packed matrix has 1 row or more and 1..{MAX_COLS} columns, not {self.rows}×{self.cols}"
            )

    @property
    def padded_rows(self) -> int:
        return -(-self.rows // STRIP) * STRIP

    @property
    def padded_cols(self) -> int:
        return -(-self.cols // (2 * GROUP)) * 2 * GROUP

    @property
    def scales_at(self) -> int:
        """Where the scales begin, in bytes."""
        return self.padded_rows * self.padded_cols // (1 if self.kind == "int8" else 2)

    @property
    def groups_at(self) -> int:
        """Where the groups' steps and zeros begin, in bytes."""
        return self.scales_at + 4 * self.padded_rows

    @property
    def num_bytes(self) -> int:
        groups = 0 if self.kind == "int8" else self.padded_rows * self.padded_cols // GROUP
        return -(-(self.groups_at + groups) // 64) * 64


def pack(weight: Tensor, kind: Kind) -> Tensor:
    """Quantises and packs (rows, cols), any float dtype: (num_bytes,) uint8 on the CPU.

    Raises ValueError for another shape or type and for NaN or infinity, which no scale could hold.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"expected a float matrix, got {weight.dtype} of shape {tuple(weight.shape)}")
    shape = PackedShape(kind, *weight.shape)
    packed = torch.zeros(shape.num_bytes, dtype=torch.uint8)
    step = max(_CHUNK // shape.padded_cols // STRIP, 1) * STRIP
    for start in range(0, shape.rows, step):
        wide = weight[start : start + step].to(device="cpu", dtype=torch.float32)
        if not wide.isfinite().all():
            raise ValueError("the weight holds NaN or infinity")
        padding = (0, shape.padded_cols - shape.cols, 0, -wide.shape[0] % STRIP)
        _pack_rows(F.pad(wide, padding), packed, shape, start)
    return packed


def pack_expert(gate: Tensor, up: Tensor, down: Tensor, kind: Kind) -> Tensor:
    """One expert's three matrices as one block: gate and up (width, hidden), down (hidden, width)."""
    return torch.cat([pack(gate, kind), pack(up, kind), pack(down, kind)])


def expert_shapes(kind: Kind, hidden: int, width: int) -> tuple[PackedShape, PackedShape, PackedShape]:
    """Gate, up and down as they follow one another in `pack_expert`'s block."""
    return PackedShape(kind, width, hidden), PackedShape(kind, width, hidden), PackedShape(kind, hidden, width)


def unpack(packed: Tensor, shape: PackedShape) -> Tensor:
    """The weights that the bytes stand for: (rows, cols) fp32."""
    values, scales = integers(packed, shape)
    return values * scales[:, None]


def integers(packed: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor]:
    """What both formats mean: (rows, cols) int8 of -127..127, and (rows,) fp32 scales.

    Raises ValueError where the number of bytes is not the shape's.
    """
    if packed.dtype != torch.uint8 or packed.shape != (shape.num_bytes,):
        seen = f"{packed.dtype} of shape {tuple(packed.shape)}"
        raise ValueError(f"{shape.rows}×{shape.cols} in {shape.kind} is {shape.num_bytes} bytes, got {seen}")
    strips = shape.padded_rows // STRIP
    codes, scales, groups = _parts(packed, shape)
    if shape.kind == "int8":
        values = codes.view(strips, -1, STRIP, 4).transpose(1, 2).reshape(shape.padded_rows, -1)
        values = (values.to(torch.int16) - 128).to(torch.int8)
    else:
        quads = codes.view(strips, -1, GROUP // 4, STRIP, 4).permute(0, 3, 1, 2, 4)  # strip, row, pair, quad, input
        code = torch.stack([quads & 15, quads >> 4], dim=3).reshape(shape.padded_rows, -1, GROUP).to(torch.int16)
        spread = groups.view(strips, -1, STRIP).transpose(1, 2).reshape(shape.padded_rows, -1, 1)
        step, shift = (spread & 15).to(torch.int16), spread.view(torch.int8).to(torch.int16) >> 4
        values = (step * (code - 8 - shift)).to(torch.int8).flatten(1)
    return values[: shape.rows, : shape.cols].contiguous(), scales[: shape.rows].clone()


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (M, cols) as int8 of -127..127 and one fp32 scale a row, NaN where the row was not finite."""
    wide = x.float()
    largest = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(x.shape[0])
    usable = largest.isfinite() & (largest >= _SMALLEST)
    inverse = torch.where(usable, 127 / torch.where(usable, largest, 1), 0)
    rounded = torch.where(usable[:, None], wide * inverse[:, None], 0).round_()
    scales = torch.where(usable, largest / 127, torch.where(largest < _SMALLEST, 0.0, torch.nan))
    return rounded.clamp_(-127, 127).to(torch.int8), scales


def integer_linear(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """y = x Wᵀ with W as `integers` gives it: (M, cols) by (rows, cols) gives (M, rows) fp32."""
    quantized, x_scales = quantize_rows(x)
    total = torch.ops.aten._int_mm(quantized, values.t())
    return total.float() * (x_scales[:, None] * scales)


def _parts(packed: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and groups: views of the bytes."""
    groups = shape.padded_rows * shape.padded_cols // GROUP if shape.kind == "int4" else 0
    scales = packed[shape.scales_at : shape.groups_at]
    if scales.storage_offset() % 4:  # a block that begins at an odd byte of a file
        scales = scales.clone()
    return packed[: shape.scales_at], scales.view(torch.float32), packed[shape.groups_at : shape.groups_at + groups]


def _pack_rows(wide: Tensor, packed: Tensor, shape: PackedShape, start: int) -> None:
    """Writes whole strips, padded, of which the first row is `start`."""
    strips, cols = wide.shape[0] // STRIP, wide.shape[1]
    codes, scales, groups = _parts(packed, shape)
    largest = wide.abs().amax(dim=1)
    scale = largest / (127 if shape.kind == "int8" else 120)  # 8 steps of 15 each way
    scale = torch.where(largest >= _SMALLEST, scale, 1)
    scales[start : start + wide.shape[0]] = scale
    scaled = wide.div_(scale[:, None])
    if shape.kind == "int8":
        quads = scaled.round_().add_(128).to(torch.uint8).view(torch.int32)  # four inputs move as one
        laid = quads.view(strips, STRIP, -1).transpose(1, 2)
        codes[start * cols :][: wide.numel()].view(torch.int32).view(laid.shape).copy_(laid)
        return
    code, step, zero = _steps_and_zeros(scaled.view(wide.shape[0], -1, GROUP))
    halves = code.view(strips, STRIP, -1, 2, GROUP // 4, 4)
    quads = (halves[:, :, :, 0] | halves[:, :, :, 1] << 4).view(torch.int32)
    laid = quads.squeeze(4).permute(0, 2, 3, 1)  # strip, pair, quad, row
    codes[start * cols // 2 :][: wide.numel() // 2].view(torch.int32).view(laid.shape).copy_(laid)
    both = ((zero - 8).to(torch.int8) * 16).view(torch.uint8) | step.to(torch.uint8)
    laid = both.view(strips, STRIP, -1).transpose(1, 2)
    groups[start * cols // GROUP :][: wide.numel() // GROUP].view(laid.shape).copy_(laid)


def _steps_and_zeros(scaled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The 4-bit codes of (rows, groups, 32) numbers of -120..120: uint8 codes, and each group's step and zero.

    Tried is the step that just covers the group's range and 0, one less (finer, and the outermost numbers are cut) and
    one more; the least squared error wins. -127..127 is never left: the numbers are within 120, the steps within 15.
    """
    low, high = scaled.amin(dim=2, keepdim=True).clamp_(max=0), scaled.amax(dim=2, keepdim=True).clamp_(min=0)
    covering = ((high - low) / 15).ceil()
    best_error, best = torch.empty(0), (torch.empty(0), torch.empty(0), torch.empty(0))
    for change in (-1, 0, 1):
        step = (covering + change).clamp(1, 15)
        zero = (7.5 - (high + low) / (2 * step)).round().clamp(0, 15)
        code = (scaled / step).round_().add_(zero).clamp_(0, 15)
        error = ((code - zero) * step - scaled).square_().sum(dim=2, keepdim=True)
        if change == -1:
            best_error, best = error, (code, step, zero)
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = tuple(torch.where(better, new, old) for new, old in zip((code, step, zero), best, strict=True))
    code, step, zero = best
    return code.to(torch.uint8), step.squeeze(2), zero.squeeze(2)
