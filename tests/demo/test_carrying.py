"""The reasoning demo's problems: what is easy, what is harder, and that nothing examined is ever trained on."""

from __future__ import annotations

import pytest

from fireflyer.data.arithmetic import Problem
from fireflyer.demo import carrying
from fireflyer.demo.carrying import (
    answer,
    cold_start,
    easy_examination,
    examination,
    harder,
    num_carries,
    question,
    working,
)


def _carries_by_columns(problem: Problem) -> int:
    """From the numbers alone: a column carries when the ends of the numbers up to it don't give the result's end."""
    a, op, b = problem
    if op == "+":
        return sum(a % 10**k + b % 10**k >= 10**k for k in range(1, 9))
    return sum(a % 10**k < b % 10**k for k in range(1, 9))


@pytest.mark.parametrize(
    ("problem", "carries"),
    [(Problem(11, "+", 22), 0), (Problem(19, "+", 22), 1), (Problem(99, "+", 1), 2), (Problem(100, "-", 1), 2)],
)
def test_carries_by_hand(problem: Problem, carries: int):
    assert num_carries(problem) == carries


def test_easy_problems_carry_nothing_and_harder_ones_do():
    hard = harder(0, 500, held_out=100)
    assert all(num_carries(p) == _carries_by_columns(p) for p in hard)
    assert {num_carries(p) for p in hard} == set(range(1, 9))
    assert {num_carries(p) for p in easy_examination(0, 200)} == {0}
    assert all(p.op == "+" or p.a > p.b for p in [*hard, *easy_examination(0, 200)])
    assert 0.4 < sum(p.op == "+" for p in hard) / 500 < 0.6


def test_no_held_out_problem_is_trained_on():
    held_out = examination(3, 200)
    keys = {frozenset([(p.a, p.b), (p.b, p.a)]) | {p.op} for p in held_out}
    assert len(keys) == 200
    assert keys.isdisjoint({frozenset([(p.a, p.b), (p.b, p.a)]) | {p.op} for p in harder(3, 3000, held_out=200)})


def test_the_cold_start_shows_both_ways():
    examples = cold_start(1, 40)
    for number, example in enumerate(examples):
        user, assistant = example["messages"]
        a, op, b = user["content"][:8], user["content"][8], user["content"][9:]
        problem = Problem(int(a), op, int(b))
        assert _carries_by_columns(problem) == 0
        thought = working(problem) if number % 2 == 0 else ""
        assert assistant["content"] == f"<think>{thought}</think>{answer(problem)}"
        assert question(problem) == user["content"]
        assert int(answer(problem)) == problem.result


def test_problems_are_functions_of_seed_and_number():
    assert harder(5, 30, held_out=10) == harder(5, 50, held_out=10)[:30] != harder(6, 30, held_out=10)
    assert cold_start(5, 10) == cold_start(5, 20)[:10]
    assert examination(5, 10) == examination(5, 20)[:10]


def test_a_problem_with_a_carry_is_found_within_a_few_tries():
    """However small the share that was drawn for it."""
    drawn = carrying._drawn(0, "training", 0, share=carrying._LEAST_SHARE)
    with_carry = sum(num_carries(next(drawn)) > 0 for _ in range(300))
    assert with_carry > 30
    assert len(harder(2, 600, held_out=10)) == 600
