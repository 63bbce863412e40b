"""The reasoning demo's problems: sums and differences in which nothing is carried, and harder ones, in which it is.

The cold start shows the easy ones, every second with its working and the others with the bare answer: where nothing is
carried, both ways can work. The harder ones are what reinforcement learning is given, with answers and no working; the
held-out ones among them are in neither. All are functions of (seed, number) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fireflyer.data.arithmetic import PLACES, Problem, format_problem, worked_answer
from fireflyer.data.draws import fraction, words

FEWEST_PLACES = 3
"""Numbers have from this many digits to eight."""

_LEAST_SHARE = 0.05
"""So that a problem with a carry is found after a few tries."""


def question(problem: Problem) -> str:
    """What the user says: `12345678+00000042`."""
    return format_problem(*problem).removesuffix("=")


def answer(problem: Problem) -> str:
    """Nine digits."""
    return f"{problem.result:0{PLACES + 1}d}"


def working(problem: Problem) -> str:
    """`a8210b7402…`: the places from the last to the first, as in `builtin:arithmetic`."""
    return worked_answer(*problem).partition("=")[0]


def num_carries(problem: Problem) -> int:
    """Places at which something is carried or borrowed."""
    work = working(problem)
    return sum(int(work[5 * place + 3]) for place in range(PLACES))


def cold_start(seed: int, count: int) -> list[dict[str, Any]]:
    """Conversations to imitate, as `fireflyer sft` reads them: easy problems, every second without its working."""
    return [_conversation(_easy(seed, i), worked=i % 2 == 0) for i in range(count)]


def harder(seed: int, count: int, *, held_out: int) -> list[Problem]:
    """Problems with carries; none of the `held_out` first ones of `examination`, nor these swapped."""
    taken = {_twin(problem) for problem in examination(seed, held_out)}
    found: list[Problem] = []
    for problem in _harder_ones(seed, "training"):
        if len(found) == count:
            break
        if _twin(problem) not in taken:
            found.append(problem)
    return found


@lru_cache(maxsize=4)
def examination(seed: int, count: int) -> tuple[Problem, ...]:
    """Held-out problems with carries, each once; swapped counts as the same."""
    found: dict[tuple[int, str, int], Problem] = {}
    for problem in _harder_ones(seed, "held-out"):
        if len(found) == count:
            break
        found.setdefault(_twin(problem), problem)
    return tuple(found.values())


def easy_examination(seed: int, count: int) -> list[Problem]:
    """Problems like those of the cold start, others than its first 2**32."""
    return [_easy(seed, 2**32 + i) for i in range(count)]


def _conversation(problem: Problem, worked: bool) -> dict[str, Any]:
    thought = working(problem) if worked else ""
    return {
        "messages": [
            {"role": "user", "content": question(problem)},
            {"role": "assistant", "content": f"<think>{thought}</think>{answer(problem)}"},
        ]
    }


def _easy(seed: int, index: int) -> Problem:
    return next(p for p in _drawn(seed, "easy", index, share=0.0) if num_carries(p) == 0)


def _harder_ones(seed: int, part: str) -> Iterator[Problem]:
    index = 0
    while True:
        # From problems in which hardly anything is carried, the most, to those in which nearly every place is.
        share = _LEAST_SHARE + (1 - _LEAST_SHARE) * fraction(words(seed, "share", part, index)[0]) ** 2
        yield next(p for p in _drawn(seed, part, index, share=share) if num_carries(p) > 0)
        index += 1


def _drawn(seed: int, part: str, index: int, share: float) -> Iterator[Problem]:
    """Tries of one problem, in which a place carries with probability `share`."""
    attempt = 0
    while True:
        first = words(seed, part, index, attempt)
        op = "+-"[first[0] & 1]
        places = FEWEST_PLACES + first[1] % (PLACES - FEWEST_PLACES + 1)
        a = b = carry = 0
        for place in range(places):
            word = words(seed, part, index, attempt, place)
            carries = fraction(word[0]) < share and not (op == "-" and place == places - 1)
            pairs = _pairs(op, carry, carries)
            x, y = pairs[word[1] % len(pairs)]
            a, b, carry = a + x * 10**place, b + y * 10**place, int(carries)
        if a > b or op == "+":
            yield Problem(a, op, b)
        attempt += 1


@lru_cache(maxsize=8)
def _pairs(op: str, carry: int, carries: bool) -> list[tuple[int, int]]:
    """Pairs of digits at which, with `carry` coming in, something is carried on, or nothing is."""
    found = []
    for x in range(10):
        for y in range(10):
            value = x + y + carry if op == "+" else x - y - carry
            if (not 0 <= value <= 9) == carries:
                found.append((x, y))
    return found


def _twin(problem: Problem) -> tuple[int, str, int]:
    return min(problem.a, problem.b), problem.op, max(problem.a, problem.b)
