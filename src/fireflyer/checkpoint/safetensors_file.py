"""Safetensors files, read by rows and written by rows, so that no more than a chunk of a tensor is ever in memory.

The format: eight bytes of header length, a JSON header (name -> dtype, shape, byte range), the bytes of the tensors one
behind the other. Reading goes past the page map on purpose: mapped files count as memory of the process, and a loader
that promises a bound must keep it. Writing goes tensor by tensor, as experts that share one parameter can't be handed
to the library without copying; the bytes are those that the library writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fireflyer.config.messages import shown
from fireflyer.errors import UserError

CHUNK_BYTES = 32 << 20
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class TensorRows(Protocol):
    """What can be written: a tensor, or one that still lies in a file. A slice gives rows along the first axis.

    `dtype` is what it is stored as where nobody asks for another; rows may come wider.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __getitem__(self, rows: slice, /) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; `offset` is the file position of its first byte."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Rows along the first axis, read now; a scalar is one row. Raises UserError where the file ends early."""
        start, stop, step = rows.indices(self.shape[0] if self.shape else 1)
        assert step == 1
        out = torch.empty((max(stop - start, 0), *self.shape[1:]), dtype=self.dtype)
        if out.numel() == 0:
            return out
        self._read(start * (out.nbytes // (stop - start)), out)
        return out

    def read(self) -> Tensor:
        """The whole tensor."""
        return self[:].reshape(self.shape)

    def read_row(self, row: int, into: Tensor) -> None:
        """One row's bytes into memory that is there: contiguous, of the row's size. Raises UserError as above."""
        self._read(row * into.nbytes, into)

    def _read(self, start: int, into: Tensor) -> None:
        """Fill `into` from the tensor's byte `start` on."""
        read_into(into, self.path, self.offset + start, self.name)


def read_into(into: Tensor, path: Path, offset: int, name: str) -> None:
    """Fill contiguous memory from a file's byte `offset` on. Raises UserError, with the tensor's name where it ends."""
    view = into.flatten().view(torch.uint8).numpy().data
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while view:
                got = file.readinto(view)
                if not got:
                    raise UserError(f"{path}: cut short within {name}; copy or download it again")
                view = view[got:]
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the file and its disk") from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a file by name, none of them read yet. Raises UserError where the file is damaged."""
    again = "copy or download it again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise UserError(f"{path}: a Git LFS pointer, not the weights; fetch them with git lfs pull")
            length = int.from_bytes(start, "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER_BYTES:
                raise UserError(f"{path}: not a safetensors file, or cut short ({size} bytes); {again}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check that it is there and readable") from None
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its safetensors header isn't JSON; {again}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: its safetensors header is no table of tensors; {again}")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _range_of(path, *item)):
        start, stop = _range_of(path, name, entry)
        code, shape = entry.get("dtype"), entry.get("shape")
        if code not in _DTYPES:
            raise UserError(f"{path}: tensor {shown(name)} has dtype {shown(code)}, which isn't read; convert it")
        is_shape = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not is_shape or start != end or stop - start != prod(shape) * _DTYPES[code].itemsize:
            raise UserError(f"{path}: damaged: bytes {start} to {stop} don't fit tensor {shown(name)}; {again}")
        tensors[name] = StoredTensor(path, name, _DTYPES[code], tuple(shape), 8 + length + start)
        end = stop
    if 8 + length + end != size:
        raise UserError(f"{path}: its header promises {8 + length + end} bytes, the file has {size}; {again}")
    return tensors


def _range_of(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise UserError(f"{path}: damaged: no byte range for tensor {shown(name)}; copy or download it again")
    return offsets[0], offsets[1]


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorRows],
    dtypes: Mapping[str, torch.dtype] | None = None,
    *,
    alignment: int = 8,
) -> None:
    """Write one file; `dtypes` stores the named tensors in another dtype, rounded once. The same values give the same
    bytes: wide dtypes first, as the format's alignment wants, then by name. `alignment`: of the first tensor in the
    file. Raises OSError."""
    stored = {name: (dtypes or {}).get(name, tensor.dtype) for name, tensor in tensors.items()}
    header, offsets = lay_out({name: (stored[name], tuple(tensors[name].shape)) for name in tensors}, alignment)
    with open(path, "wb") as file:
        file.write(header)
        for name in offsets:
            for rows in row_chunks(tensors[name]):
                file.write(as_bytes(rows, stored[name]))


def lay_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], alignment: int = 8
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds tensors of these dtypes and shapes, and the file position of each tensor,
    in their order in the file."""
    offsets: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        offsets[name], end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-(8 + len(encoded)) % alignment)
    start = 8 + len(encoded)
    return len(encoded).to_bytes(8, "little") + encoded, {name: start + at for name, at in offsets.items()}


def as_bytes(rows: Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of rows stored as `dtype`."""
    chunk = rows.detach().to(device="cpu", dtype=dtype).contiguous()
    return chunk.flatten().view(torch.uint8).numpy().data


def num_bytes(tensor: TensorRows, dtype: torch.dtype) -> int:
    """Size of the tensor when stored as `dtype`."""
    return prod(tensor.shape) * dtype.itemsize


def row_chunks(tensor: TensorRows) -> Iterator[Tensor]:
    """The tensor's rows in order, as many at a time as fill CHUNK_BYTES in fp32."""
    count = tensor.shape[0]
    step = rows_per_chunk(tensor.shape)
    for start in range(0, count, step):
        yield tensor[start : min(start + step, count)]


def rows_per_chunk(shape: tuple[int, ...]) -> int:
    """How many rows of such a tensor fill CHUNK_BYTES in fp32; at least one."""
    return max(1, CHUNK_BYTES // max(1, 4 * prod(shape[1:])))
