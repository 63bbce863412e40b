"""builtin:arithmetic: sums and differences with written-out working, without end.

Out: documents like `12345678+00000042=` (the prompt, no loss), then the working from the last digit to the first, each
place as its letter, the two digits, the carry or borrow, and the digit of the result (`a8210b7402…`), then the result.
All documents have the same length, digits are single tokens, so rows of that many tokens hold one problem each. The
letters tell the model which place it is at: without them it has to count, and learns more slowly.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from fireflyer.data.documents import Document
from fireflyer.data.draws import words

PLACES = 8
_PLACE_NAMES = "abcdefgh"
_ANSWER = re.compile(rf"=(\d{{{PLACES + 1}}})\s*$")
# Of twelve operands five have all eight digits: the long ones are the hard ones.
_DIGIT_COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8)


class Problem(NamedTuple):
    """a + b, or a - b with a > b; both have at most eight digits."""

    a: int
    op: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b


def format_problem(a: int, op: str, b: int) -> str:
    """The prompt: `12345678+00000042=`."""
    return f"{a:0{PLACES}d}{op}{b:0{PLACES}d}="


def worked_answer(a: int, op: str, b: int) -> str:
    """What the model has to write: eight places, last digit first, then `=` and the nine-digit result."""
    places = []
    carry = 0
    for place in range(PLACES):
        digit_a, digit_b = a // 10**place % 10, b // 10**place % 10
        value = digit_a + digit_b + carry if op == "+" else digit_a - digit_b - carry
        carry = int(not 0 <= value <= 9)
        places.append(f"{_PLACE_NAMES[place]}{digit_a}{digit_b}{carry}{value % 10}")
    return f"{''.join(places)}={Problem(a, op, b).result:0{PLACES + 1}d}"


def read_answer(text: str) -> int | None:
    """The result at the end of a worked answer (with or without its prompt), or None if it doesn't end in one."""
    match = _ANSWER.search(text)
    return int(match.group(1)) if match else None


def held_out_problems(
    seed: int, n_sums: int = 500, n_differences: int = 500, eight_digit_share: float = 0.4
) -> list[Problem]:
    """Problems that ArithmeticSource(seed) never shows in training, nor with their numbers swapped.

    They are unique (swapped counts as the same); the first `eight_digit_share` of each kind has two 8-digit numbers.
    """
    problems: list[Problem] = []
    taken: set[tuple[int, str, int]] = set()
    for op, count in (("+", n_sums), ("-", n_differences)):
        attempt = found = 0
        while found < count:
            problem = _draw(op, words(seed, "held-out", op, attempt), full=found < count * eight_digit_share)
            attempt += 1
            if problem is not None and _twin(problem) not in taken:
                taken.add(_twin(problem))
                problems.append(problem)
                found += 1
    return problems


class ArithmeticSource:
    """Document i is a function of (seed, i) alone; held-out problems are skipped. A data.documents.Source."""

    name = "builtin:arithmetic"
    num_documents = None
    num_bytes = None

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fingerprint(self) -> str:
        return f"{self.name} {self.seed}"

    def order(self, *key: int | str) -> range:
        return range(2**62)

    def num_parts(self, document: int) -> int:
        return 1

    def read(self, document: int, part: int = 0) -> Document:
        attempt = 0
        while True:
            drawn = words(self.seed, "training", document, attempt)
            problem = _draw("+-"[drawn[4] & 1], drawn, full=False)
            if problem is not None and _twin(problem) not in self._held_out:
                return _document(problem)
            attempt += 1

    def held_out_documents(self) -> Iterator[Iterator[Document]]:
        problems = sorted(held_out_problems(self.seed), key=lambda problem: words(*problem))
        return (iter([_document(problem)]) for problem in problems)

    @cached_property
    def _held_out(self) -> frozenset[tuple[int, str, int]]:
        return frozenset(_twin(problem) for problem in held_out_problems(self.seed))


def _document(problem: Problem) -> Document:
    prompt = format_problem(*problem)
    return Document(prompt + worked_answer(*problem), loss_from=len(prompt))


def _draw(op: str, drawn: list[int], full: bool) -> Problem | None:
    """A problem from four words; None if it is a difference of equal numbers."""
    a, b = (
        _number(PLACES if full else _DIGIT_COUNTS[count % len(_DIGIT_COUNTS)], word)
        for count, word in (drawn[0:2], drawn[2:4])
    )
    if op == "-":
        a, b = max(a, b), min(a, b)
        if a == b:
            return None
    return Problem(a, op, b)


def _number(digits: int, word: int) -> int:
    low = 10 ** (digits - 1) if digits > 1 else 0
    return low + word % (10**digits - low)


def _twin(problem: Problem) -> tuple[int, str, int]:
    """One key for a problem and the one with its numbers swapped."""
    return min(problem.a, problem.b), problem.op, max(problem.a, problem.b)
