"""What this machine can do at most: the yardstick beside every speed."""

from __future__ import annotations

import statistics
import time

import torch


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


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    begun = time.perf_counter()
    torch.matmul(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - begun
