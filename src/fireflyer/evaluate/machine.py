"""What this machine can do at most: the yardstick beside every speed."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fireflyer.infer.paged_cache import free_bytes


def measure_matmul_flops_per_s(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", size: int = 1024, seconds: float = 0.5
) -> float:
    """Operations per second of a square matrix product: the median over repeats for about `seconds`.

    A utilisation against it says how much of what the machine's own library reaches a program keeps busy.
    """
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [_timed(left, right) for _ in range(3)][1:]
    while sum(times) < seconds:
        times.append(_timed(left, right))
    return 2 * size**3 / statistics.median(times)


def measure_read_bytes_per_s(gib: float = 1.0, seconds: float = 0.5) -> float:
    """Bytes per second at which all threads read memory that no cache holds: the median over repeats for `seconds`.

    The faster of two products that read every number once and write next to nothing. Decoding one sequence reads each
    active weight once a token, so this over their bytes is the most tokens per second that weights of that size allow.
    """
    numbers = torch.ones(int(gib * 2**28))
    rows = numbers[: numbers.numel() // 4096 * 4096].view(-1, 4096)
    vector = numbers[:4096].clone()
    products: tuple[Callable[[], Tensor], ...] = (lambda: torch.dot(numbers, numbers), lambda: torch.mv(rows, vector))
    return numbers.nbytes / min(_median_s(product, seconds / 2) for product in products)


@dataclass(frozen=True)
class Machine:
    """What a model would find here. Bytes; the memory is what the process's group may have where it has a limit.

    process_bytes: of this process, with torch loaded and nothing done: what any that answers takes before its model.
    disk_bytes_per_s: reading past the system's cache; None where there was no file to try it on.
    """

    memory_total: int
    memory_free: int
    disk_free: int
    process_bytes: int
    read_bytes_per_s: float
    disk_bytes_per_s: float | None
    gpu: str | None
    gpu_free: int | None


def measure_machine(folder: Path) -> Machine:
    """This machine, its disk where `folder` is (or would be), and how fast both are read."""
    process = _resident_bytes()
    free = free_bytes(torch.device("cpu"))
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    gpu = torch.cuda.is_available()
    return Machine(
        memory_total=_memory_total(),
        memory_free=free,
        disk_free=shutil.disk_usage(place).free,
        process_bytes=process,
        read_bytes_per_s=measure_read_bytes_per_s(gib=min(1.0, free / 2**32)),
        disk_bytes_per_s=_disk_bytes_per_s(folder),
        gpu=torch.cuda.get_device_name() if gpu else None,
        gpu_free=free_bytes(torch.device("cuda")) if gpu else None,
    )


def _memory_total() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, int(limit)) if limit != "max" else total
    except (OSError, ValueError):
        return total


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError):  # not Linux
        return 300 << 20


def _disk_bytes_per_s(folder: Path, most: int = 256 << 20) -> float | None:
    """Reading a model's largest file past the system's cache; None where there is none, or the system can't."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    direct = getattr(os, "O_DIRECT", None)
    if not files or direct is None:
        return None
    file = max(files, key=lambda path: path.stat().st_size)
    buffer = mmap.mmap(-1, 8 << 20)  # aligned to a page, as reading past the cache wants it
    try:
        descriptor = os.open(file, os.O_RDONLY | direct)
    except OSError:
        return None
    try:
        begun, done = time.perf_counter(), 0
        while done < most and (got := os.preadv(descriptor, [buffer], done)) == len(buffer):
            done += got
        return done / (time.perf_counter() - begun) if done else None
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _median_s(product: Callable[[], Tensor], seconds: float) -> float:
    times: list[float] = []
    product()
    while sum(times) < seconds or len(times) < 3:
        begun = time.perf_counter()
        product()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _timed(left: Tensor, right: Tensor) -> float:
    begun = time.perf_counter()
    torch.matmul(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - begun
