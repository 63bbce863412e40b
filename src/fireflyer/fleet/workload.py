"""What a lab asks of its cluster in a month, drawn from named distributions; and how often its nodes fail.

In: a load, a number of days, a seed. Out: submissions in order of time. The same arguments give the same workload.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DAY_S = 86_400.0
YEAR_S = 365.0 * DAY_S
NUM_PRIORITIES = 7


@dataclass(frozen=True, slots=True)
class Submission:
    """A task as its user hands it in. work_s: how long it runs if nobody stops it. priority: 6 goes first (only the
    priority baseline looks at it)."""

    id: str
    user: str
    num_nodes: int
    work_s: float
    submitted_s: float
    priority: int


@dataclass(frozen=True)
class Workload:
    """The distributions.

    Arrivals: a Poisson process whose rate follows the day, 1 + `day_swing` x sin; users weighted as Zipf's law, rank to
    the power -`user_exponent`.
    Sizes: powers of two up to `max_nodes`, probability as a power law, nodes to the power -`size_exponent`.
    Lengths: log-normal with this median and sigma, cut to [`min_s`, `max_s`].
    Priorities: uniform over seven.
    """

    num_users: int = 60
    user_exponent: float = 0.5
    day_swing: float = 0.5
    max_nodes: int = 256
    size_exponent: float = 0.6
    median_s: float = 3_600.0
    sigma: float = 2.0
    min_s: float = 120.0
    max_s: float = 21.0 * DAY_S

    def draw(self, num_nodes: int, warm_up_s: float, end_s: float, load: float, seed: int) -> list[Submission]:
        """Submissions from -`warm_up_s` to `end_s` that ask for `load` times the node-seconds between 0 and `end_s`.

        Exactly so where every task starts when it comes and runs through: the lengths are scaled by one factor for
        that. What came before the warm-up and would still run then comes at its begin, with what is left of it.
        """
        rng = np.random.default_rng(seed)
        begin_s = -warm_up_s - self.max_s
        sizes, lengths = self._sizes(rng, 100_000, num_nodes), self._lengths(rng, 100_000)
        rate = load * num_nodes / (sizes.mean() * lengths.mean())
        count = max(1, int(rng.poisson(rate * (end_s - begin_s))))
        sizes, lengths = self._sizes(rng, count, num_nodes), self._lengths(rng, count)
        times = np.sort(self._times(rng, count, begin_s, end_s))
        lengths *= _factor(sizes, lengths, times, end_s, load * num_nodes * end_s)
        gone_s = np.maximum(0.0, -warm_up_s - times)
        shares = np.arange(1, self.num_users + 1) ** -self.user_exponent
        users = rng.choice(self.num_users, size=count, p=shares / shares.sum())
        priorities = rng.integers(NUM_PRIORITIES, size=count)
        return [
            Submission(
                f"t{i:06d}",
                f"user{users[i]:02d}",
                int(sizes[i]),
                float(lengths[i] - gone_s[i]),
                float(times[i] + gone_s[i]),
                int(priorities[i]),
            )
            for i in np.flatnonzero(lengths > gone_s)
        ]

    def _sizes(self, rng: np.random.Generator, count: int, num_nodes: int) -> np.ndarray:
        options = 2 ** np.arange(int(math.log2(min(self.max_nodes, num_nodes))) + 1)
        odds = options**-self.size_exponent
        return rng.choice(options, size=count, p=odds / odds.sum())

    def _lengths(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.clip(rng.lognormal(math.log(self.median_s), self.sigma, count), self.min_s, self.max_s)

    def _times(self, rng: np.random.Generator, count: int, begin_s: float, end_s: float) -> np.ndarray:
        """Times with the day's rate: drawn evenly, and kept with the probability that the rate has there."""
        times = np.empty(0)
        while len(times) < count:
            drawn = rng.uniform(begin_s, end_s, 2 * count)
            rate = 1.0 + self.day_swing * np.sin(2.0 * math.pi * drawn / DAY_S)
            times = np.concatenate([times, drawn[rng.uniform(0.0, 1.0 + self.day_swing, len(drawn)) < rate]])
        return times[:count]


def _factor(sizes: np.ndarray, lengths: np.ndarray, times: np.ndarray, end_s: float, wanted: float) -> float:
    """By what to multiply the lengths so that between 0 and the end there is so much to do."""
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2.0
        spans = np.minimum(times + middle * lengths, end_s) - np.maximum(times, 0.0)
        low, high = (middle, high) if np.dot(sizes, np.maximum(spans, 0.0)) < wanted else (low, middle)
    return high


@dataclass(frozen=True)
class Faults:
    """The published counts of one year of the article's cluster (1,250 nodes of 8 GPUs), every log line taken as a
    fault of its own, which is the worst that they can mean.

    A node goes out for repair at an NVLink error (Xid 74: 42.6 % of 12,970 lines), a GPU memory error (2.1 %) or a main
    memory error (54 in 6 months). Only the task dies at Xid 43 and 31 (33.5 % and 19.2 %), which a program's own
    mistakes cause, and at an InfiniBand link flap (213). Both strike nodes evenly, at Poisson times.
    """

    node_faults_per_year: float = 12_970 * (0.426 + 0.021) + 2 * 54
    task_faults_per_year: float = 12_970 * (0.335 + 0.192) + 213
    of_nodes: int = 1_250
    repair_s: float = 4.0 * 3_600.0  # the mean of an exponential distribution; not published, so a guess

    def draw(self, num_nodes: int, begin_s: float, end_s: float, seed: int) -> list[tuple[float, int, float | None]]:
        """(when, which node, out of service for how long; None: only the task dies), in order of time."""
        rng = np.random.default_rng([seed, 1])
        found: list[tuple[float, int, float | None]] = []
        for per_year, breaks in ((self.node_faults_per_year, True), (self.task_faults_per_year, False)):
            mean = per_year * num_nodes / self.of_nodes * (end_s - begin_s) / YEAR_S
            count = int(rng.poisson(mean))
            repairs = rng.exponential(self.repair_s, count)
            for when, node, repair in zip(
                rng.uniform(begin_s, end_s, count), rng.integers(num_nodes, size=count), repairs, strict=True
            ):
                found.append((float(when), int(node), float(repair) if breaks else None))
        return sorted(found, key=lambda fault: fault[0])
