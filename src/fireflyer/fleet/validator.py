"""The examination of a node, run on it as a job: memory, arithmetic, communication, disk. Meant for silent errors.

    memory          patterns and their complements written to memory and read back, word by word
    matmul          products of integers, whose exact result is known whatever the order of summation; torch on each
                    device where torch is there, else numpy
    all-reduce      gloo between two processes, against the known sum (where torch is there)
    disk            random bytes written, synced, dropped from the cache and read back

In: how much of the memory and disk to use. Out: verdict.json in the attempt's folder; exit code 0 or 1.
"""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fireflyer.fleet.records import ATTEMPT_VARIABLE, VERDICT, write_json

MEMORY_BYTES = 256 << 20
DISK_BYTES = 32 << 20
MATMUL_SIZE = 512
SIZE_VARIABLE = "FIREFLYER_FLEET_VALIDATE_MIB"
"""How much memory to examine (--node-env sets it); by default a little, so that an examination takes seconds."""
_PATTERNS = (0x00, 0xFF, 0x55, 0xAA)


def main(arguments: list[str]) -> int:
    """`[FOLDER]`; without it the folder of this attempt."""
    folder = Path(arguments[0] if arguments else os.environ[ATTEMPT_VARIABLE])
    memory_bytes = int(os.environ.get(SIZE_VARIABLE, MEMORY_BYTES >> 20)) << 20
    checks: list[dict[str, Any]] = []
    for name, check in (
        ("memory", lambda: check_memory(memory_bytes)),
        ("matmul", check_matmul),
        ("all-reduce", check_all_reduce),
        ("disk", lambda: check_disk(folder, DISK_BYTES)),
    ):
        checks.append(_run(name, check))
    ok = all(check["ok"] for check in checks)
    write_json(folder / VERDICT, {"ok": ok, "host": socket.gethostname(), "checks": checks})
    return 0 if ok else 1


def _run(name: str, check: Callable[[], str]) -> dict[str, Any]:
    """A check's line: what it said, or why it failed."""
    began = time.monotonic()
    try:
        said, ok = check(), True
    except Exception as error:  # whatever a broken node does to it is its finding
        said, ok = f"{type(error).__name__}: {error}" if not isinstance(error, Fault) else str(error), False
    return {"name": name, "ok": ok, "said": said, "seconds": round(time.monotonic() - began, 3)}


class Fault(Exception):
    """The node gave a wrong result."""


def check_memory(size_bytes: int) -> str:
    """Each pattern, then a pseudo-random one that differs at each place, so that crossed address lines show."""
    block = np.empty(size_bytes // 8, dtype=np.uint64)
    for pattern in _PATTERNS:
        word = np.uint64(int.from_bytes(bytes([pattern]) * 8, "little"))
        block.fill(word)
        _compare(block, word, f"pattern {pattern:#04x}")
    mixed = np.arange(block.size, dtype=np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    np.copyto(block, mixed)
    _compare(block, mixed, "address pattern")
    return f"{size_bytes >> 20} MiB hold 5 patterns"


def _compare(block: Any, expected: Any, what: str) -> None:
    wrong = np.flatnonzero(block != expected)
    if wrong.size:
        raise Fault(f"{what}: {wrong.size} words of {block.size} differ, the first at byte {int(wrong[0]) * 8}")


def check_matmul() -> str:
    """Integers small enough for their product to be exact in fp32, against integer arithmetic."""
    draw = np.random.default_rng(0)
    left = draw.integers(-8, 9, (MATMUL_SIZE, MATMUL_SIZE))
    right = draw.integers(-8, 9, (MATMUL_SIZE, MATMUL_SIZE))
    expected = np.einsum("ik,kj->ij", left, right)
    places = []
    for place, product in _products(left.astype(np.float32), right.astype(np.float32)):
        wrong = int((product.astype(np.int64) != expected).sum())
        if wrong:
            raise Fault(f"{place}: {wrong} of {expected.size} elements of a product are wrong")
        places.append(place)
    return f"{MATMUL_SIZE} x {MATMUL_SIZE} exact on {', '.join(places)}"


def _products(left: Any, right: Any) -> list[tuple[str, Any]]:
    products = [("numpy", left @ right)]
    if find_spec("torch") is not None:
        import torch

        devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        for device in devices:
            product = torch.from_numpy(left).to(device) @ torch.from_numpy(right).to(device)
            products.append((f"torch on {device}", product.cpu().numpy()))
    return products


_ALL_REDUCE = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank = int(sys.argv[1])
meeting = "file://" + sys.argv[2]
dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
mine = torch.arange(1 << 20, dtype=torch.float64) * (rank + 1)
dist.all_reduce(mine)
wrong = int((mine != torch.arange(1 << 20, dtype=torch.float64) * 3).sum())
dist.destroy_process_group()
sys.exit(f"{wrong} of {1 << 20} sums are wrong" if wrong else 0)
"""


def check_all_reduce() -> str:
    """Two processes of this node sum what each holds."""
    if find_spec("torch") is None:
        return "left out: no torch here"
    folder = Path(os.environ.get(ATTEMPT_VARIABLE) or ".").resolve()
    meeting = folder / f"meeting-{os.getpid()}"
    command = [sys.executable, "-c", _ALL_REDUCE]
    ranks = [
        subprocess.Popen([*command, str(rank), str(meeting)], stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    meeting.unlink(missing_ok=True)
    for rank, text in zip(ranks, said, strict=True):
        if rank.returncode:
            raise Fault((text.strip().splitlines() or ["no reason given"])[-1])
    return "8 MiB summed by gloo on 2 processes"


def check_disk(folder: Path, size_bytes: int) -> str:
    """In the fleet's own folder, where every job's records go."""
    path = folder / f"disk-{os.getpid()}"
    content = np.random.default_rng(1).bytes(size_bytes)
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if hashlib.sha256(path.read_bytes()).digest() != hashlib.sha256(content).digest():
            raise Fault(f"{size_bytes >> 20} MiB came back from {folder} other than they were written")
    finally:
        path.unlink(missing_ok=True)
    return f"{size_bytes >> 20} MiB written, synced and read back"
