"""builtin:expressions: sums and differences, products, and products with something added or taken away, all worked out.

Out: documents like `0347*26+012345=` (the prompt, no loss), then the working, from the last digit to the first, each
place as its own letter, two digits, the carry and the digit of the result: for a product a row for each digit of the
second number, then the rows' sum; then what is added or taken away; then `=` and the result. All documents have the
same length: shorter ones begin with spaces. Numbers are written with one place more than training ever fills, so that
longer ones than it has seen can be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Literal, NamedTuple, get_args

from fireflyer.data.documents import Document
from fireflyer.data.draws import words

Kind = Literal["sum", "difference", "product", "mixed"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SUM_DIGITS, FACTOR_DIGITS, ADDED_DIGITS = 8, 3, 5
"""The most digits that training has in a sum's numbers, a product's first factor, and what a product is changed by."""

_SUM_PLACES, _FACTOR_PLACES, _PRODUCT_PLACES = SUM_DIGITS + 1, FACTOR_DIGITS + 1, FACTOR_DIGITS + 3
_SHARES: tuple[Kind, ...] = ("sum", "difference", "product", "product", "product", "mixed", "mixed", "mixed")
_ANSWER = re.compile(r"=(\d+)\s*$")


class Expression(NamedTuple):
    """a op b, or a * b op c. Results are never negative."""

    kind: Kind
    a: int
    op: str
    b: int
    c: int = 0

    @property
    def result(self) -> int:
        if self.kind == "product":
            return self.a * self.b
        left, right = (self.a * self.b, self.c) if self.kind == "mixed" else (self.a, self.b)
        return left + right if self.op == "+" else left - right


def format_expression(expression: Expression) -> str:
    """The prompt, as long as every prompt and working together need: `      0347*26=`."""
    kind, a, op, b, c = expression
    if kind in ("sum", "difference"):
        text = f"{a:0{_SUM_PLACES}d}{op}{b:0{_SUM_PLACES}d}="
    else:
        text = f"{a:0{_FACTOR_PLACES}d}*{b:02d}" + (f"{op}{c:0{_PRODUCT_PLACES}d}=" if kind == "mixed" else "=")
    return text.rjust(_LENGTH - len(_working(expression)))


def worked_answer(expression: Expression) -> str:
    """What the model has to write after the prompt."""
    return _working(expression)


def read_answer(text: str) -> int | None:
    """The result at the end of a worked answer, or None if it doesn't end in one."""
    match = _ANSWER.search(text)
    return int(match.group(1)) if match else None


def _working(expression: Expression) -> str:
    kind, a, op, b, c = expression
    if kind in ("sum", "difference"):
        return f"{_columns('abcdefghi', a, op, b)}={expression.result:0{_SUM_PLACES + 1}d}"
    rows = _row("ABCD", a, b % 10) + _row("EFGH", a, b // 10)
    text = rows + _columns("klmnop", a * (b % 10), "+", a * (b // 10) * 10)
    if kind == "mixed":
        text += _columns("abcdef", a * b, op, c)
    return f"{text}={expression.result:0{_PRODUCT_PLACES + 1}d}"


def _columns(letters: str, a: int, op: str, b: int) -> str:
    """A sum or difference, place by place: letter, both digits, carry or borrow, digit of the result."""
    text, carry = "", 0
    for place, letter in enumerate(letters):
        digit_a, digit_b = a // 10**place % 10, b // 10**place % 10
        value = digit_a + digit_b + carry if op == "+" else digit_a - digit_b - carry
        carry = int(not 0 <= value <= 9)
        text += f"{letter}{digit_a}{digit_b}{carry}{value % 10}"
    return text


def _row(letters: str, a: int, digit: int) -> str:
    """a times one digit, place by place: letter, digit of a, the digit, carry, digit of the row."""
    text, carry = "", 0
    for place, letter in enumerate(letters):
        value = a // 10**place % 10 * digit + carry
        carry = value // 10
        text += f"{letter}{a // 10**place % 10}{digit}{carry}{value % 10}"
    return text


_LENGTH = len("0347*26+012345=") + len(_working(Expression("mixed", 347, "+", 26, 12345)))


def held_out_expressions(seed: int, count: int, kind: Kind, *, longer: bool = False) -> list[Expression]:
    """`count` different expressions of one kind that training with this seed never shows, nor with swapped numbers.

    longer: with one digit more than training ever has, in a sum's numbers or a product's first factor.
    """
    found: dict[tuple[Kind, int, str, int, int], Expression] = {}
    attempt = 0
    while len(found) < count:
        expression = _draw(kind, words(seed, "held-out", kind, int(longer), attempt), full=True, more=int(longer))
        attempt += 1
        if expression is not None:
            found.setdefault(_twin(expression), expression)
    return list(found.values())


class ExpressionSource:
    """Document i is a function of (seed, i) alone; held-out expressions are skipped. A data.documents.Source."""

    name = "builtin:expressions"
    num_documents = None
    num_bytes = None
    held_out_of_each = 250

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
            expression = _draw(_SHARES[drawn[7] % len(_SHARES)], drawn, full=False, more=0)
            if expression is not None and _twin(expression) not in self._held_out:
                return _document(expression)
            attempt += 1

    def held_out_documents(self) -> Iterator[Iterator[Document]]:
        expressions = sorted(self._held_out.values(), key=lambda expression: words(*expression))
        return (iter([_document(expression)]) for expression in expressions)

    @cached_property
    def _held_out(self) -> dict[tuple[Kind, int, str, int, int], Expression]:
        drawn = [held_out_expressions(self.seed, self.held_out_of_each, kind) for kind in KINDS]
        return {_twin(expression): expression for expressions in drawn for expression in expressions}


def _document(expression: Expression) -> Document:
    prompt = format_expression(expression)
    return Document(prompt + worked_answer(expression), loss_from=len(prompt))


def _draw(kind: Kind, drawn: list[int], *, full: bool, more: int) -> Expression | None:
    """An expression from eight words; None where that would be negative. full: as many digits as there may be."""
    if kind in ("sum", "difference"):
        a, b = (_number(_digits(SUM_DIGITS + more, drawn[i], full), drawn[i + 1]) for i in (0, 2))
        return Expression(kind, a, "+", b) if kind == "sum" else Expression(kind, max(a, b), "-", min(a, b))
    a = _number(_digits(FACTOR_DIGITS + more, drawn[0], full), drawn[1])
    b = _number(_digits(2, drawn[2], full), drawn[3])
    if kind == "product":
        return Expression(kind, a, "*", b)
    op, c = "+-"[drawn[6] & 1], _number(_digits(ADDED_DIGITS, drawn[4], full), drawn[5])
    return Expression(kind, a, op, b, c) if op == "+" or a * b >= c else None


def _digits(most: int, word: int, full: bool) -> int:
    """Half of all numbers have all the digits: the long ones are the hard ones."""
    return most if full or word & 1 else 1 + (word >> 1) % most


def _number(digits: int, word: int) -> int:
    low = 10 ** (digits - 1) if digits > 1 else 0
    return low + word % (10**digits - low)


def _twin(expression: Expression) -> tuple[Kind, int, str, int, int]:
    """One key for an expression and the one with the numbers of its sum or product swapped."""
    kind, a, op, b, c = expression
    return kind, min(a, b), op, max(a, b), c
