"""What a conversion will write: every file, its first bytes, and the steps that make its tensors, row by row.

In: a checkpoint's published tensors, still in files, and the precision wanted. Out: files of pieces; a piece makes one
tensor, or in FP8 a weight with its scales, and each of its steps a few rows. Nothing is read before a step is taken,
and the steps depend on source and precision alone, so that a conversion may stop between any two and go on later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fireflyer.checkpoint.hf import MAX_SHARD_BYTES, plan_shards
from fireflyer.checkpoint.names import Place, published_places, scale_name
from fireflyer.checkpoint.packed import ALIGNMENT, plan_packed
from fireflyer.checkpoint.published import BlockFP8Tensor
from fireflyer.checkpoint.safetensors_file import TensorRows, lay_out, rows_per_chunk
from fireflyer.config import ModelConfig
from fireflyer.model.packed import KINDS
from fireflyer.numerics.fp8 import WEIGHT_BLOCK, quantize_block, scale_shape

Precision = Literal["bf16", "fp32", "fp8", "int8", "int4"]

PUBLISHED_FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(WEIGHT_BLOCK),
}
"""`quantization_config` of the released files."""
POWERS_OF_TWO = "ue8m0"
"""`scale_fmt` of V3.1: scales are powers of two."""

Output = tuple[torch.dtype, tuple[int, ...]]
Made = list[tuple[str, int, Tensor]]
"""(tensor, its first row, rows) that a step made; the rows may come wider than they are stored."""


class Piece(Protocol):
    """What is made together: `outputs` are dtype and shape by name, in the order in which they are written."""

    @property
    def outputs(self) -> dict[str, Output]: ...
    @property
    def num_steps(self) -> int: ...
    def make(self, step: int) -> Made: ...


@dataclass(frozen=True)
class RowsPiece:
    """One tensor, rounded to `dtype`; rows in groups that suit a block of FP8."""

    name: str
    source: TensorRows
    dtype: torch.dtype

    @property
    def outputs(self) -> dict[str, Output]:
        return {self.name: (self.dtype, tuple(self.source.shape))}

    @property
    def height(self) -> int:
        """Rows of a step."""
        return _rows_at_a_time(self.source) if isinstance(self.source, BlockFP8Tensor) else _rows(self.source)

    @property
    def num_steps(self) -> int:
        return -(-self.source.shape[0] // self.height)

    def make(self, step: int) -> Made:
        start = step * self.height
        rows = slice(start, min(start + self.height, self.source.shape[0]))
        if isinstance(self.source, BlockFP8Tensor):
            return [(self.name, start, self.source.read(rows, self.dtype))]
        return [(self.name, start, self.source[rows].to(self.dtype))]


@dataclass(frozen=True)
class FP8Piece:
    """A matrix quantised in blocks of 128 x 128, and its scales."""

    name: str
    source: TensorRows
    power_of_two: bool

    @property
    def outputs(self) -> dict[str, Output]:
        rows, columns = self.source.shape
        scales = scale_shape((rows, columns), WEIGHT_BLOCK)
        return {
            self.name: (torch.float8_e4m3fn, (rows, columns)),
            scale_name(self.name): (torch.float32, scales),
        }

    @property
    def num_steps(self) -> int:
        return -(-self.source.shape[0] // _rows_at_a_time(self.source))

    def make(self, step: int) -> Made:
        height = _rows_at_a_time(self.source)
        start = step * height
        rows = self.source[start : min(start + height, self.source.shape[0])]
        weight, scale_inv = quantize_block(rows, WEIGHT_BLOCK, power_of_two=self.power_of_two)
        return [(self.name, start, weight), (scale_name(self.name), start // WEIGHT_BLOCK[0], scale_inv)]


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: `pieces` in the order in which they are made; `offsets` of every tensor's first byte."""

    name: str
    pieces: tuple[Piece, ...]
    header: bytes
    offsets: dict[str, int]
    num_bytes: int

    @property
    def steps(self) -> list[tuple[Piece, int]]:
        return [(piece, step) for piece in self.pieces for step in range(piece.num_steps)]


@dataclass(frozen=True)
class ConversionPlan:
    """All of a conversion but the tokenizer. `index`: what the index says, or None where one file holds everything."""

    to: Precision
    files: tuple[PlannedFile, ...]
    config: dict[str, Any]
    index: dict[str, Any] | None

    @property
    def outputs(self) -> dict[str, Output]:
        """Dtype and shape of everything written."""
        return {name: kind for file in self.files for piece in file.pieces for name, kind in piece.outputs.items()}

    @property
    def num_bytes(self) -> int:
        """Of all files together, headers included."""
        return sum(file.num_bytes for file in self.files)


def plan_conversion(
    config: ModelConfig,
    tensors: Mapping[str, TensorRows],
    to: Precision,
    published: dict[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ConversionPlan:
    """Plan it; nothing is read.

    config, tensors: a Checkpoint's. published: its config.json as it is, so that keys of others come along.
    """
    if to in KINDS:
        packed = plan_packed(config, tensors, to)
        files = tuple(
            _file(name, [RowsPiece(own, rows, rows.dtype) for own, rows in shard.items()], ALIGNMENT)
            for name, shard in packed.shards.items()
        )
        return ConversionPlan(to, files, packed.config_json(), packed.index())
    power_of_two = (published.get("quantization_config") or {}).get("scale_fmt") == POWERS_OF_TWO
    pieces = [
        piece
        for place in sorted(published_places(config), key=lambda place: place.name)
        for piece in _pieces(place, tensors[place.name], to, power_of_two)
    ]
    by_name = {_first(piece): piece for piece in pieces}
    sizes = {name: _num_bytes(piece.outputs) for name, piece in by_name.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    files = tuple(_file(shard, [by_name[name] for name in names]) for shard, names in shards.items())
    index = None
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in sorted(file.offsets)}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return ConversionPlan(to, files, _config_json(config, published, to, power_of_two), index)


def _pieces(place: Place, source: TensorRows, to: Precision, power_of_two: bool) -> list[Piece]:
    if place.is_gate_bias:
        return [RowsPiece(place.name, source, torch.float32)]
    if to != "fp8" or not place.is_quantized:
        return [RowsPiece(place.name, source, torch.float32 if to == "fp32" else torch.bfloat16)]
    if isinstance(source, BlockFP8Tensor) and source.block == WEIGHT_BLOCK:
        # As it is: quantising what was dequantised could move a scale's last bit.
        return [
            RowsPiece(place.name, source.weight, torch.float8_e4m3fn),
            RowsPiece(scale_name(place.name), source.scale_inv, torch.float32),
        ]
    return [FP8Piece(place.name, source, power_of_two)]


def _file(name: str, pieces: list[Piece], alignment: int = 8) -> PlannedFile:
    outputs = {tensor: kind for piece in pieces for tensor, kind in piece.outputs.items()}
    header, offsets = lay_out(outputs, alignment)
    in_file_order = sorted(pieces, key=lambda piece: offsets[_first(piece)])
    return PlannedFile(name, tuple(in_file_order), header, offsets, len(header) + _num_bytes(outputs))


def _config_json(config: ModelConfig, published: dict[str, Any], to: Precision, power_of_two: bool) -> dict[str, Any]:
    """The source's own, true again: precision, quantisation, and MTP layers that aren't in the files."""
    changed = dict(published)
    for key in {"torch_dtype", "dtype"} & changed.keys() or {"torch_dtype"}:
        changed[key] = "float32" if to == "fp32" else "bfloat16"
    if to == "fp8":
        changed["quantization_config"] = PUBLISHED_FP8 | ({"scale_fmt": POWERS_OF_TWO} if power_of_two else {})
    else:
        changed.pop("quantization_config", None)
    for key in {"num_nextn_predict_layers", "num_mtp_layers"} & changed.keys():
        changed[key] = config.num_nextn_predict_layers
    return changed


def _first(piece: Piece) -> str:
    return next(iter(piece.outputs))


def _num_bytes(outputs: Mapping[str, Output]) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in outputs.values())


def _rows(source: TensorRows) -> int:
    return rows_per_chunk(tuple(source.shape))


def _rows_at_a_time(source: TensorRows) -> int:
    """Rows of a step, whole blocks high."""
    height = source.block[0] if isinstance(source, BlockFP8Tensor) else 1
    unit = lcm(height, WEIGHT_BLOCK[0])
    return max(1, _rows(source) // unit) * unit
