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
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fireflyer.errors import UserError
from fireflyer.numerics.integer import PackedShape

FOLDER = Path(__file__).resolve().parent
LEVELS = {"scalar": 0, "avx2": 1, "avx512": 2, "vnni": 3, "amx": 4, "neon": 10}
FP32, BF16, INT8, INT4 = range(4)


class Matrix(ctypes.Structure):
    """FFMatrix of native.h: W with `rows` outputs and `cols` inputs. It does not keep the memory alive."""

    _fields_ = (
        ("data", c_void_p),
        ("stride", c_int64),
        ("rows", c_int32),
        ("cols", c_int32),
        ("kind", c_int32),
    )


class Library:
    """The loaded kernels. Every tensor given is on the CPU; x and y are fp32 with unit stride in their last axis."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        self.raw = loaded
        """The C functions themselves, for callers that hold pointers of their own."""
        loaded.ff_linear.argtypes = [POINTER(Matrix), c_void_p, c_int64, c_int, c_void_p, c_int64, c_int]
        loaded.ff_linear.restype = None
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


def packed_matrix(packed: Tensor, shape: PackedShape) -> Matrix:
    """A block of bytes that numerics/integer.py packed."""
    assert packed.device.type == "cpu"
    assert packed.is_contiguous()
    assert packed.numel() == shape.num_bytes
    return Matrix(packed.data_ptr(), 0, shape.rows, shape.cols, {"int8": INT8, "int4": INT4}[shape.kind])


def dense_matrix(weight: Tensor) -> Matrix:
    """A weight as torch keeps it: (rows, cols) fp32 or bf16 on the CPU, unit stride along its inputs."""
    assert weight.device.type == "cpu"
    assert weight.dim() == 2
    assert weight.stride(1) == 1
    kind = {torch.float32: FP32, torch.bfloat16: BF16}[weight.dtype]
    return Matrix(weight.data_ptr(), weight.stride(0), weight.shape[0], weight.shape[1], kind)


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
