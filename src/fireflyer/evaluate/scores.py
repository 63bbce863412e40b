"""From right and wrong answers to a score and how sure it is. In: numbers a problem. Out: means with 95 % intervals.

Samples of one problem resemble each other, so problems are what is drawn: an interval over several samples a problem is
a bootstrap over problems (clustered). Where each problem gives 0 or 1 it is Wilson's, which stays honest near 0 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np

_Z = 1.959963984540054
"""Of a standard normal, 97.5 % lie below."""

_DRAWS = 2000


@dataclass(frozen=True)
class Score:
    """value: the mean over problems; low, high: its 95 % interval, by this method (None: one problem tells no spread);
    problems: how many."""

    value: float
    low: float | None
    high: float | None
    method: Literal["wilson", "bootstrap over problems"] | None
    problems: int


def score(values: Sequence[float], weights: Sequence[float] | None = None) -> Score:
    """Of one number a problem. weights: the number counts so often (bits a byte, over documents of unequal length).

    Raises ValueError without numbers.
    """
    if not values:
        raise ValueError("a score needs at least one problem")
    if weights is None and all(value in (0.0, 1.0) for value in values):
        low, high = wilson(round(sum(values)), len(values))
        return Score(sum(values) / len(values), low, high, "wilson", len(values))
    if len(values) == 1:
        return Score(values[0], None, None, None, 1)
    low, high = _bootstrap(np.asarray(values, dtype=np.float64), np.asarray(weights or np.ones(len(values))))
    return Score(float(np.average(values, weights=weights)), low, high, "bootstrap over problems", len(values))


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which never leaves 0 to 1 and has a width at both ends."""
    share, z2 = successes / trials, _Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from `samples` >= k (Chen et al. 2021,
    equation 1): one minus the share of k-subsets that hold no right one."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority_at_k(answers: Sequence[str], correct: Sequence[bool], k: int) -> float:
    """The chance that the most frequent of k answers is right: the mean over consecutive blocks of k (the rest is left
    out). Equal counts share the vote; answers that couldn't be read ("") don't vote.
    """
    blocks = [range(start, start + k) for start in range(0, len(answers) - k + 1, k)]
    return sum(_majority([(answers[i], correct[i]) for i in block]) for block in blocks) / len(blocks)


def _majority(votes: Sequence[tuple[str, bool]]) -> float:
    read = sorted(vote for vote in votes if vote[0])
    groups = [list(group) for _, group in groupby(read, key=lambda vote: vote[0])]
    if not groups:
        return 0.0
    most = max(map(len, groups))
    leaders = [group for group in groups if len(group) == most]
    # Alike answers are graded alike; where a grader differs, its mean counts.
    return sum(sum(right for _, right in group) / len(group) for group in leaders) / len(leaders)


def _bootstrap(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Percentiles of the mean over problems drawn again; the same numbers give the same interval."""
    draws = np.random.default_rng(0)
    means = np.empty(_DRAWS)
    for index in range(_DRAWS):
        chosen = draws.integers(0, len(values), len(values))
        means[index] = np.average(values[chosen], weights=weights[chosen])
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
