"""What this machine can do at most: the yardstick beside every speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


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
