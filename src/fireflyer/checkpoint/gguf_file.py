"""GGUF files, llama.cpp's format: metadata and tensors by name, read by rows and dequantised on the way.

In: a `.gguf` file, or any part of one that was split. Out: the metadata as Python values, and for every tensor its
shape, its quantisation and its bytes on demand. Reading goes past the page map, as for safetensors: a loader that
promises a bound must keep it. Block sizes and dequantisers are those of the `gguf` package, llama.cpp's own.

The format: "GGUF", version, counts of tensors and of metadata pairs; the pairs; name, dimensions (innermost first),
type and offset of each tensor; padding; the tensors. docs/gguf.md of ggml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fireflyer.checkpoint.safetensors_file import read_into
from fireflyer.config.messages import shown
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

GET_ALL = "get the whole file, made by a recent llama.cpp"
_AGAIN = "copy or download it again"
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ = (*_PLAIN, *"Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S".split())
_READ += tuple("IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4".split())
"""All that the package dequantises."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a file. `shape` is outermost first; `offset` is the file position of its first byte."""

    path: Path
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """What its values are stored as elsewhere: a quantised one's would gain nothing from more than bf16."""
        return _PLAIN.get(self.kind.name, torch.bfloat16)

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows along the last axis, all other axes counted as one: (stop - start, width), in fp32 where quantised.
        Raises UserError where the file ends early."""
        row_bytes = _row_bytes(self.kind, self.shape[-1])
        raw = torch.empty(max(stop - start, 0) * row_bytes, dtype=torch.uint8)
        read_into(raw, self.path, self.offset + start * row_bytes, self.name)
        if self.kind.name in _PLAIN:
            return raw.view(self.dtype).view(-1, self.shape[-1])
        from gguf.quants import dequantize

        return torch.from_numpy(dequantize(raw.numpy().reshape(-1, row_bytes), self.kind))


@dataclass(frozen=True)
class GGUF:
    """One model's file, or all parts of it: the first part's metadata, and the tensors of all."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def is_gguf(path: str | Path) -> bool:
    """Whether a path means a GGUF file, by its name."""
    return Path(path).suffix.lower() == ".gguf"


def read_gguf(path: str | Path) -> GGUF:
    """All of a file's metadata and where its tensors are, none of them read yet; parts of one file are read together.

    Raises UserError where the `gguf` package is missing, the file is damaged, or a part of it is absent.
    """
    require_gguf()
    first, *others = _parts(Path(path))
    whole = _read_part(first)
    count = whole.metadata.get("split.count", 1)
    if count not in (0, 1) and count != 1 + len(others):
        raise UserError(
            f"{first}: one of {count} parts; name them as llama.cpp does, {first.stem}-00001-of-{count:05d}.gguf"
        )
    for part in others:
        for name, tensor in _read_part(part).tensors.items():
            if name in whole.tensors:
                raise UserError(f"{part}: holds {shown(name)}, as {whole.tensors[name].path} does; get both again")
            whole.tensors[name] = tensor
    promised = whole.metadata.get("split.tensors.count", len(whole.tensors))
    if promised != len(whole.tensors):
        raise UserError(f"{first}: its parts hold {len(whole.tensors)} tensors of {promised}; {_AGAIN}")
    return whole


def require_gguf() -> None:
    """Raises UserError with the line to type where the `gguf` package is missing."""
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise UserError("GGUF files need the gguf package; type: pip install 'fireflyer[gguf]'") from None


def _parts(path: Path) -> list[Path]:
    """The file alone, or all parts in order where its name says that it is one of several. Raises UserError."""
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    parts = [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1)]
    missing = [part for part in parts if not part.is_file()]
    if missing or not parts:
        raise UserError(f"{missing[0] if missing else path}: missing, one of {match[3]} parts; get it too")
    return parts


class _Header:
    """What stands before the tensors, value by value."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path, self._file, self._size = path, file, size

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise UserError(f"{self._path}: cut short within its header ({self._size} bytes); {_AGAIN}")
        return self._file.read(count)

    def unsigned(self, num_bytes: int = 8) -> int:
        return int.from_bytes(self.read(num_bytes), "little")

    def string(self) -> str:
        return self.read(self.unsigned()).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.unsigned(4), self.unsigned()
            if element in _NUMBERS:
                dtype = np.dtype(_NUMBERS[element])
                return np.frombuffer(self.read(count * dtype.itemsize), dtype).tolist()
            return [self.value(element) for _ in range(count)]
        if kind not in _NUMBERS:
            raise UserError(f"{self._path}: damaged: a metadata value of type {kind}; {_AGAIN}")
        dtype = np.dtype(_NUMBERS[kind])
        number = np.frombuffer(self.read(dtype.itemsize), dtype)[0]
        # The shortest number that means these four bytes: 2.446, and not 2.446000099182129.
        return float(str(number)) if kind == 6 else number.item()

    def end(self, alignment: int) -> int:
        """Where the tensors begin."""
        return -(-self._file.tell() // alignment) * alignment


def _read_part(path: Path) -> GGUF:
    try:
        size = path.stat().st_size
        with open(path, "rb", buffering=1 << 20) as file:
            return _parse(path, _Header(path, file, size), size)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check that it is there and readable") from None


def _parse(path: Path, header: _Header, size: int) -> GGUF:
    if size < 24 or header.read(4) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file, though it is named so; give one that llama.cpp reads")
    version = header.unsigned(4)
    if version & 0xFFFF == 0:
        raise UserError(f"{path}: a big-endian GGUF file, which isn't read; convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} isn't read; only 2 and 3 are: make it anew")
    num_tensors, num_pairs = header.unsigned(), header.unsigned()
    metadata = {}
    for _ in range(num_pairs):
        key = header.string()
        metadata[key] = header.value(header.unsigned(4))
    found = [_tensor(path, header) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise UserError(f"{path}: damaged: general.alignment is {shown(alignment)}; {_AGAIN}")
    start = header.end(alignment)
    tensors = {}
    for name, shape, kind, offset in found:
        tensor = GGUFTensor(path, name, kind, shape, start + offset)
        if tensor.offset + tensor.num_rows * _row_bytes(kind, shape[-1]) > size:
            raise UserError(f"{path}: cut short: {shown(name)} would end beyond its {size} bytes; {_AGAIN}")
        tensors[name] = tensor
    return GGUF(path, metadata, tensors)


def _tensor(path: Path, header: _Header) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    """(name, shape, quantisation, offset among the tensors) of one tensor. Raises UserError."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, num_dimensions = header.string(), header.unsigned(4)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise UserError(f"{path}: damaged: {shown(name)} has {num_dimensions} dimensions; {_AGAIN}")
    shape = tuple(header.unsigned() for _ in range(num_dimensions))[::-1]
    number, offset = header.unsigned(4), header.unsigned()
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        kind = None
    if kind is None or kind.name not in _READ:
        raise UserError(
            f"{path}: {shown(name)} is quantised as {number if kind is None else kind.name}, which isn't read; known"
            f" are {', '.join(_READ)}"
        )
    block = GGML_QUANT_SIZES[kind][0]
    if 0 in shape or shape[-1] % block:
        raise UserError(f"{path}: damaged: {shown(name)} {shape} doesn't divide into blocks of {block}; {_AGAIN}")
    return name, shape, kind, offset


def _row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    from gguf import GGML_QUANT_SIZES

    block, num_bytes = GGML_QUANT_SIZES[kind]
    return width // block * num_bytes
