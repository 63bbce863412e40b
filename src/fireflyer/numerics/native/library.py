"""The native kernels: found, checked and called; their C interface in one place.

`library()` gives the `Library` or None. None (no compiler when Fireflyer was built, another platform, or
FIREFLYER_NATIVE=0) means that torch computes: each kernel here has its equal in torch, which tests hold it to.
FIREFLYER_NATIVE=scalar|avx2|avx512|vnni|amx keeps to what a lesser CPU has.

Threads. The kernels run on torch's own OpenMP pool, found at run time (threads.c), so the same threads do torch's work
and theirs; call from the thread that runs torch's operations, since the pool belongs to its caller. A region costs a
microsecond or two while the pool's threads still spin, tens of them once they sleep. So a decode step's work should be
few regions, with `ff_barrier` between the parts inside one: the `_team` functions of native.h are for that.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from fireflyer.errors import UserError
from fireflyer.numerics.integer import PackedShape

FOLDER = Path(__file__).resolve().parent
LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2, "vnni": 3, "amx": 4, "neon": 10}
FP32, BF16, INT8, INT4 = range(4)
_KINDS = {"int8": INT8, "int4": INT4}
_DENSE_KINDS = {torch.float32: FP32, torch.bfloat16: BF16}
ExpertShapes: TypeAlias = tuple[PackedShape, PackedShape, PackedShape]
"""Gate, up and down, as `numerics.integer.expert_shapes` gives them."""


class Matrix(ctypes.Structure):
    """FFMatrix of native.h: W with `rows` outputs and `cols` inputs. It does not keep the memory alive."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("rows", c_int32),
        ("cols", c_int32),
        ("kind", c_int32),
    )


class _Rows(ctypes.Structure):
    """FFRows of native.h."""

    _fields_ = (
        ("q", c_void_p),
        ("sums", c_void_p),
        ("totals", c_void_p),
        ("scales", c_void_p),
        ("stride", c_int64),
        ("m", c_int32),
        ("cols", c_int32),
    )


class ExpertsCall(ctypes.Structure):
    """FFExpertsCall of native.h, FFExperts spelt out at its beginning."""

    _fields_ = (
        ("table", c_void_p),
        ("experts", c_int32),
        ("hidden", c_int32),
        ("width", c_int32),
        ("kind", c_int32),
        ("x", c_void_p),
        ("y", c_void_p),
        ("rows", c_void_p),
        ("indices", c_void_p),
        ("weights", c_void_p),
        ("x_stride", c_int64),
        ("y_stride", c_int64),
        ("tokens", c_int32),
        ("top_k", c_int32),
        ("given", c_void_p),
        ("starts", c_void_p),
        ("row_of", c_void_p),
        ("wide", c_void_p),
        ("gathered", c_void_p),
        ("x_rows", _Rows),
        ("wide_rows", _Rows),
        ("next", c_int32 * 2),
    )


@dataclass(frozen=True)
class ExpertTable:
    """Where a layer's experts lie.

    addresses (E, 3) int64: gate and up (width, hidden) and down (hidden, width); 0 for an expert that is not there.
    """

    addresses: Tensor
    hidden: int
    width: int
    kind: int
    memory: Sequence[Tensor]
    """What the addresses point into, kept alive."""

    @classmethod
    def stacked(cls, packed: Tensor, shapes: ExpertShapes) -> ExpertTable:
        """All experts, of one tensor (E, bytes) whose rows `numerics.integer.pack_expert` made."""
        assert packed.is_contiguous()
        starts = packed.data_ptr() + torch.arange(packed.shape[0]) * packed.shape[1]
        return cls(starts[:, None] + _parts_at(shapes), *_experts_shape(shapes), [packed])

    @classmethod
    def some(cls, num_experts: int, blocks: Mapping[int, Tensor], shapes: ExpertShapes) -> ExpertTable:
        """These experts alone, each with its block of bytes, as `pack_expert` made it."""
        starts = torch.tensor([block.data_ptr() for block in blocks.values()], dtype=torch.int64)
        addresses = torch.zeros(num_experts, 3, dtype=torch.int64)
        addresses[torch.tensor(list(blocks), dtype=torch.int64)] = starts[:, None] + _parts_at(shapes)
        return cls(addresses, *_experts_shape(shapes), list(blocks.values()))

    @classmethod
    def one(cls, num_experts: int, expert: int, gate_up_JD: Tensor, down_DI: Tensor) -> ExpertTable:
        """This expert alone, fp32 or bf16: gate above up, (2 · width, hidden), and (hidden, width)."""
        addresses = torch.zeros(num_experts, 3, dtype=torch.int64)
        gate = gate_up_JD.data_ptr()
        addresses[expert] = torch.tensor([gate, gate + gate_up_JD.nbytes // 2, down_DI.data_ptr()])
        hidden, width = down_DI.shape
        return cls(addresses, hidden, width, _DENSE_KINDS[down_DI.dtype], [gate_up_JD, down_DI])

    @classmethod
    def dense(cls, gate_up_EJD: Tensor, down_EDI: Tensor) -> ExpertTable:
        """fp32 or bf16 experts as torch keeps them: gate above up, (E, 2 · width, hidden), and (E, hidden, width)."""
        assert gate_up_EJD.is_contiguous()
        assert down_EDI.is_contiguous()
        number = torch.arange(down_EDI.shape[0])
        gate = gate_up_EJD.data_ptr() + number * gate_up_EJD[0].nbytes
        down = down_EDI.data_ptr() + number * down_EDI[0].nbytes
        _, hidden, width = down_EDI.shape
        addresses = torch.stack([gate, gate + gate_up_EJD[0].nbytes // 2, down], dim=1)
        return cls(addresses, hidden, width, _DENSE_KINDS[down_EDI.dtype], [gate_up_EJD, down_EDI])


def _experts_shape(shapes: ExpertShapes) -> tuple[int, int, int]:
    return shapes[0].cols, shapes[0].rows, _KINDS[shapes[0].kind]


def _parts_at(shapes: ExpertShapes) -> Tensor:
    gate, up, _ = shapes
    return torch.tensor([0, gate.num_bytes, gate.num_bytes + up.num_bytes])


class Library:
    """The loaded kernels. Every tensor given is on the CPU; x and y are fp32 with unit stride in their last axis."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.raw = loaded
        """The C functions themselves, for callers that hold pointers of their own."""
        loaded.ff_linear.argtypes = [POINTER(Matrix), c_void_p, c_int64, c_int, c_void_p, c_int64, c_int]
        loaded.ff_linear.restype = None
        for function in (loaded.ff_experts, loaded.ff_experts_sum):
            function.argtypes, function.restype = [POINTER(ExpertsCall), c_int], None
        loaded.ff_read.argtypes, loaded.ff_read.restype = [c_void_p, c_int64, c_int], c_uint64
        self.shares_torch_threads = bool(loaded.ff_find_pool())

    @property
    def level(self) -> str:
        """What the CPU is used as: one of LEVELS."""
        number = self.raw.ff_level()
        return next(name for name, value in LEVELS.items() if value == number)

    def set_level(self, name: str) -> str:
        """Keeps to a lesser CPU's instructions; a level that this CPU has not means its best. Returns what holds."""
        self.raw.ff_set_level(LEVELS[name])
        return self.level

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """y = x Wᵀ: x (M, cols) fp32 gives (M, rows) fp32, made for few rows of x."""
        assert x.dtype == torch.float32
        assert x.shape[1:] == (weight.cols,)
        assert x.stride(1) == 1
        y = torch.empty(x.shape[0], weight.rows)
        self.raw.ff_linear(
            weight, x.data_ptr(), x.stride(0), x.shape[0], y.data_ptr(), weight.rows, torch.get_num_threads()
        )
        return y

    def read(self, memory: Tensor) -> int:
        """Reads a contiguous tensor and does no more: what it takes is what the machine's memory allows."""
        return self.raw.ff_read(memory.data_ptr(), memory.nbytes, torch.get_num_threads())

    def experts(self, table: ExpertTable, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """y[n] = Σ_k weights[n, k] · expert indices[n, k] (x[n]): (N, hidden) fp32. The table has every chosen expert.

        indices int64, weights fp32, both contiguous.
        """
        call, y_ND = _experts_call(table, x_ND, indices_NK), torch.empty(x_ND.shape)
        assert weights_NK.dtype == torch.float32
        assert weights_NK.is_contiguous()
        call.weights, call.y = weights_NK.data_ptr(), y_ND.data_ptr()
        self.raw.ff_experts(call, torch.get_num_threads())
        return y_ND

    def fill_rows(self, table: ExpertTable, x_ND: Tensor, indices_NK: Tensor, rows_MD: Tensor) -> None:
        """Writes what the experts in the table give, by expert and then token, into their rows of `rows_MD`."""
        call = _experts_call(table, x_ND, indices_NK)
        assert rows_MD.is_contiguous()
        assert rows_MD.shape == (indices_NK.numel(), table.hidden)
        call.rows = rows_MD.data_ptr()
        self.raw.ff_experts(call, torch.get_num_threads())

    def sum_rows(self, table: ExpertTable, rows_MD: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """What `experts` gives, from rows that calls of `fill_rows` have filled: to the bit, whatever their order."""
        y_ND = torch.empty(indices_NK.shape[0], table.hidden)
        call = _experts_call(table, y_ND, indices_NK)
        call.rows, call.weights, call.y = rows_MD.data_ptr(), weights_NK.data_ptr(), y_ND.data_ptr()
        self.raw.ff_experts_sum(call, torch.get_num_threads())
        return y_ND


def _experts_call(table: ExpertTable, x_ND: Tensor, indices_NK: Tensor) -> ExpertsCall:
    assert x_ND.dtype == torch.float32
    assert x_ND.shape == (indices_NK.shape[0], table.hidden)
    assert x_ND.stride(1) == 1
    assert indices_NK.dtype == torch.int64
    assert indices_NK.is_contiguous()
    call = ExpertsCall(table.addresses.data_ptr(), len(table.addresses), table.hidden, table.width, table.kind)
    call.x, call.x_stride, call.y_stride = x_ND.data_ptr(), x_ND.stride(0), table.hidden
    call.indices, (call.tokens, call.top_k) = indices_NK.data_ptr(), indices_NK.shape
    return call


def packed_matrix(packed: Tensor, shape: PackedShape) -> Matrix:
    """A block of bytes that numerics/integer.py packed."""
    assert packed.device.type == "cpu"
    assert packed.is_contiguous()
    assert packed.numel() == shape.num_bytes
    return Matrix(packed.data_ptr(), 0, shape.rows, shape.cols, _KINDS[shape.kind])


def dense_matrix(weight: Tensor) -> Matrix:
    """A weight as torch keeps it: (rows, cols) fp32 or bf16 on the CPU, unit stride along its inputs."""
    assert weight.device.type == "cpu"
    assert weight.dim() == 2
    assert weight.stride(1) == 1
    return Matrix(weight.data_ptr(), weight.stride(0), *weight.shape, _DENSE_KINDS[weight.dtype])


@cache
def library() -> Library | None:
    """The kernels, loaded once a process; None where they are absent, from other sources, or switched off."""
    wanted = os.environ.get("FIREFLYER_NATIVE", "")
    if wanted not in ("", "0", "1", *LEVELS):
        raise UserError(f"FIREFLYER_NATIVE={wanted!r}: expected 0, 1 or one of {', '.join(LEVELS)}")
    path = FOLDER / "kernels.so"
    if wanted == "0" or not path.is_file():
        return None
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError:
        return None  # built for another machine
    loaded.ff_sources.restype = c_char_p
    if loaded.ff_sources().decode() != _sources_hash():
        return None
    found = Library(loaded)
    if wanted in LEVELS:
        found.set_level(wanted)
    return found


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
