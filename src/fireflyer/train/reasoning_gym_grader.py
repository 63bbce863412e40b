"""What the sandbox loads to score answers to reasoning-gym's problems. In: a problem, an answer. Out: 0 to 1."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import reasoning_gym
from reasoning_gym.factory import create_dataset

assert reasoning_gym  # loading it registers every data set, once for all jobs


def grade(problem: dict[str, Any], answer: str) -> float:
    """The data set's own score."""
    return _dataset(problem["name"]).score_answer(answer, problem["entry"])


@lru_cache(maxsize=2)
def _dataset(name: str) -> Any:
    return create_dataset(name, size=1, seed=0)
