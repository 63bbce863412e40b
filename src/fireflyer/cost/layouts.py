"""Ways to spread a training job over a cluster: every layout that divides and that a schedule can run. No torch.

world = pp x dp x cp; ep divides dp x cp and the number of routed experts (V3: EP64 inside its 128 data ranks).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import TypeVar

from fireflyer.config import ModelConfig
from fireflyer.cost.hardware import Gpu, Hardware
from fireflyer.cost.layer_time import RECOMPUTATIONS
from fireflyer.cost.pipeline import Pipeline, complaint

RESERVED = 0.05
"""Share of a card's memory that the driver, the communication library and fragmentation are left. An assumption."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """What shall be trained on what. `global_batch` counts sequences of `seq_len` tokens."""

    config: ModelConfig
    hardware: Hardware
    gpu: Gpu
    count: int
    seq_len: int
    global_batch: int
    precision: str

    @property
    def memory_bytes(self) -> float:
        """What a rank may use."""
        return self.gpu.memory_gb * 1e9 * (1 - RESERVED)


@dataclass(frozen=True)
class Layout:
    """`chunks`: stages a rank holds (1; 2 for the DualPipes; more if interleaved). `micro_batch` counts sequences."""

    pp: int
    dp: int
    cp: int
    ep: int
    zero: int
    micro_batch: int
    recompute: str
    schedule: str
    chunks: int = 1

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp


@dataclass(frozen=True)
class Wanted:
    """What the user fixed of a layout; None: the search's choice."""

    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    ep: int | None = None
    zero: int | None = None
    micro_batch: int | None = None
    recompute: str | None = None
    schedule: str | None = None


def layouts(job: Job, wanted: Wanted) -> Iterator[Layout]:
    """Every layout that divides and that the schedules can run."""
    experts = job.config.n_routed_experts
    for pp in _choices(wanted.pp, [pp for pp in divisors(job.count) if pp <= job.config.num_hidden_layers]):
        for cp in _choices(wanted.cp, context_choices(job.seq_len)):
            if job.count % (pp * cp):
                continue
            dp = job.count // (pp * cp)
            if wanted.dp not in (None, dp) or job.global_batch % dp:
                continue
            for ep in _choices(wanted.ep, [ep for ep in divisors(dp * cp) if experts and experts % ep == 0] or [1]):
                if (dp * cp) % ep or (ep > 1 and (not experts or experts % ep)):
                    continue
                yield from _variants(job, wanted, Layout(pp, dp, cp, ep, 1, 1, "none", "1f1b"))


def context_choices(seq_len: int) -> list[int]:
    """Context ranks worth trying: none below 32K tokens a sequence, and at least 4K tokens a rank."""
    return [cp for cp in (1, 2, 4, 8, 16, 32) if cp == 1 or (seq_len >= 32768 and seq_len // cp >= 4096)]


def _variants(job: Job, wanted: Wanted, base: Layout) -> Iterator[Layout]:
    shares = _choices(wanted.zero, [1, 2, 3] if base.dp * base.cp > 1 else [1])
    for micro_batch in _choices(wanted.micro_batch, [1, 2, 4, 8]):
        per_rank, left = divmod(job.global_batch // base.dp, micro_batch)
        if left or not per_rank:
            continue
        for schedule, chunks in schedules(base.pp, wanted.schedule):
            if complaint(Pipeline(schedule, base.pp, per_rank, chunks)):
                continue
            for recompute in _choices(wanted.recompute, list(RECOMPUTATIONS)):
                for zero in shares:
                    yield replace(
                        base,
                        zero=zero,
                        micro_batch=micro_batch,
                        recompute=recompute,
                        schedule=schedule,
                        chunks=chunks,
                    )


def schedules(pp: int, wanted: str | None) -> list[tuple[str, int]]:
    """(schedule, stages a rank) to try. DualPipeV also runs on one rank, where it hides the exchange."""
    known = [("1f1b", 1), ("dualpipev", 2)]
    if pp > 1:
        known += [("zero-bubble", 1), ("dualpipe", 2), ("interleaved", 2), ("interleaved", 4)]
    return [(name, chunks) for name, chunks in known if wanted in (None, name)]


def _choices(fixed: _T | None, others: list[_T]) -> list[_T]:
    return others if fixed is None else [fixed]


@lru_cache(maxsize=4096)
def divisors(number: int) -> list[int]:
    lower = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sorted({*lower, *(number // d for d in lower)})
