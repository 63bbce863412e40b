"""The harder problems: right in every place, unique where held out, and then never seen in training."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.data.expressions import (
    KINDS,
    Expression,
    ExpressionSource,
    Kind,
    format_expression,
    held_out_expressions,
    read_answer,
    worked_answer,
)
from fireflyer.data.mixture import open_sources

PROMPT = re.compile(r" *(\d+)([+*-])(\d+)(?:([+-])(\d+))?=")


def problem_of(text: str) -> tuple[str, int]:
    """The prompt's expression as Python reads it, and its value."""
    match = PROMPT.match(text)
    assert match
    numbers = [re.sub(r"^0+(?=\d)", "", part) if part and part.isdigit() else part for part in match.groups()]
    expression = "".join(part for part in numbers if part)
    return expression, eval(expression)


def test_two_problems_by_hand() -> None:
    product = Expression("product", 347, "*", 26)
    assert format_expression(product).strip() == "0347*26="
    rows = "A7642B4628C3620D0602" + "E7214F4209G3206H0200"  # 347 * 6 = 2082, 347 * 2 = 694
    assert worked_answer(product) == f"{rows}k2002l8412m0910n2609o0000p0000=0009022"
    mixed = Expression("mixed", 347, "-", 26, 9000)
    assert format_expression(mixed) == "0347*26-009000="
    assert worked_answer(mixed).removeprefix(worked_answer(product)[:70]) == "a2002b2002c0000d9900e0000f0000=0000022"


@given(
    kind=st.sampled_from(KINDS),
    a=st.integers(0, 9999),
    b=st.integers(0, 99),
    c=st.integers(0, 99999),
    op=st.sampled_from("+-"),
)
def test_each_place_is_schoolbook_arithmetic_and_the_result_pythons(
    kind: Kind, a: int, b: int, c: int, op: str
) -> None:
    if kind in ("sum", "difference"):
        a, b = a * 10**5 + c, b * 10**7 + c
        op = "+" if kind == "sum" else "-"
        a, b = max(a, b), min(a, b)
        c = 0
    elif kind == "product":
        op, c = "*", 0
    elif op == "-":
        c = min(c, a * b)
    expression = Expression(kind, a, op, b, c)
    prompt, working = format_expression(expression), worked_answer(expression)
    assert problem_of(prompt)[1] == expression.result == read_answer(working) == read_answer(prompt + working)
    letters = "".join(re.findall("[A-Za-z]", working))
    columns = {
        letter: (int(a), int(b), int(c), int(d))
        for letter, a, b, c, d in re.findall(r"([A-Za-z])(\d)(\d)(\d)(\d)", working)
    }
    assert len(columns) == len(letters)
    for row in ("ABCD", "EFGH"):
        carry = 0
        for letter in row if row[0] in columns else "":
            digit, factor, out, result = columns[letter]
            assert digit * factor + carry == 10 * out + result
            carry = out
    for row, sign in (("klmnop", 1), ("abcdef", -1 if op == "-" else 1), ("ghi", -1 if op == "-" else 1)):
        carry = columns["f"][2] if row == "ghi" and "g" in columns else 0
        for letter in row if row[0] in columns else "":
            digit, other, out, result = columns[letter]
            assert digit + sign * (other + carry) == sign * 10 * out + result
            carry = out


def test_all_documents_have_one_length() -> None:
    source = ExpressionSource(0)
    texts = [source.read(number).text for number in range(200)]
    longer = [e for kind in KINDS for e in held_out_expressions(0, 20, kind, longer=True)]
    assert len({len(text) for text in texts} | {len(format_expression(e) + worked_answer(e)) for e in longer}) == 1


def test_training_never_shows_what_is_held_out_and_has_every_kind() -> None:
    source = ExpressionSource(3)
    held_out = {problem_of(next(parts).text)[0] for parts in source.held_out_documents()}
    seen = [problem_of(source.read(number).text)[0] for number in range(4000)]
    assert len(held_out) == 4 * source.held_out_of_each
    assert not held_out & set(seen)
    kinds = [
        len(re.findall(pattern, "\n".join(seen), re.M)) for pattern in (r"^\d+\+", r"^\d+-", r"\*\d+$", r"\*\d+[+-]")
    ]
    assert sum(kinds) == len(seen)
    assert min(kinds) > 400


@pytest.mark.parametrize("kind", KINDS)
def test_longer_ones_have_a_digit_that_training_never_has(kind: Kind) -> None:
    most = 8 if kind in ("sum", "difference") else 3
    expressions = held_out_expressions(0, 50, kind, longer=True)
    assert {len(str(expression.a)) for expression in expressions} == {most + 1}
    assert {len(str(expression.a)) for expression in held_out_expressions(0, 50, kind)} == {most}
    documents = islice((ExpressionSource(0).read(number).text for number in range(2000)), 2000)
    assert max(len(str(int(PROMPT.match(text)[1]))) for text in documents if "*" in text) == 3  # type: ignore[index]


def test_it_opens_by_name() -> None:
    assert open_sources(["builtin:expressions:2", "builtin:arithmetic"]).names == [
        "builtin:expressions",
        "builtin:arithmetic",
    ]


@pytest.mark.parametrize("text", ["", "0347*26=", "A7642", "=12x"])
def test_what_is_no_answer_reads_as_none(text: str) -> None:
    assert read_answer(text) is None
