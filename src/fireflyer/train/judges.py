"""How answers to the problems of a file are judged: as text, as numbers, as mathematics, as programs by their tests.

In: problems and what a JSONL file expects of each. Out: one `Grade` an answer, whatever the answer is. Mathematics and
programs are judged apart, with limits of time and memory (evaluate/sandbox.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.evaluate.answers import boxed, code_block
from fireflyer.evaluate.sandbox import Limits, Outcome, Sandbox
from fireflyer.train.post_training_settings import ProblemSettings

_LONGEST_NUMBER = 400


@dataclass(frozen=True)
class Grade:
    """reward: in most environments 1 for right. correct: None where grading failed; `note` then says why."""

    reward: float
    correct: bool | None
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """What is asked, what a grader compares an answer with (any JSON value), and where it stands, for messages."""

    prompt: str
    reference: Any
    where: str


def how_it_ended(outcome: Outcome) -> str:
    """In words."""
    return f"{outcome.status}: {outcome.note}" if outcome.note else outcome.status


class _Compared:
    """Answers compared as text, or as numbers: nothing in it can hang, so it runs here."""

    def __init__(self, equal: Callable[[str, str], bool]) -> None:
        self._equal = equal

    def grade(self, pairs: Sequence[tuple[dict[str, str], str]]) -> list[Grade]:
        right = [self._equal(reference["answer"], answer) for reference, answer in pairs]
        return [Grade(float(r), r) for r in right]

    def close(self) -> None:
        pass


class _Mathematics:
    """Judged by math-verify. An answer that it can't read is wrong."""

    def __init__(self, limits: Limits) -> None:
        self._sandbox = Sandbox("math", limits)

    def grade(self, pairs: Sequence[tuple[dict[str, str], str]]) -> list[Grade]:
        outcomes = self._sandbox.run([(reference["answer"], answer) for reference, answer in pairs])
        return [
            Grade(float(outcome.value[0]), outcome.value[0])
            if outcome.status == "done"
            else Grade(0.0, None, f"math-verify {how_it_ended(outcome)}")
            for outcome in outcomes
        ]

    def close(self) -> None:
        self._sandbox.close()


class _Programs:
    """Right where the tests after it pass. What a program does wrong, hanging included, is the answer's fault."""

    def __init__(self, limits: Limits) -> None:
        self._sandbox = Sandbox("program", limits)

    def grade(self, pairs: Sequence[tuple[dict[str, str], str]]) -> list[Grade]:
        programs = [(f"{code_block(answer)}\n{reference['tests']}\n", "") for reference, answer in pairs]
        return [
            Grade(1.0, True) if outcome.status == "done" else Grade(0.0, False, how_it_ended(outcome))
            for outcome in self._sandbox.run(programs)
        ]

    def close(self) -> None:
        self._sandbox.close()


JsonlGrader = _Compared | _Mathematics | _Programs


def same_text(expected: str, answer: str) -> bool:
    """Equal but for white space around, a box around the answer, and a full stop after it."""
    return _plain(expected) == _plain(answer)


def same_number(expected: str, answer: str) -> bool:
    """The same number exactly: 1,000 and 1000.0 are."""
    wanted, got = _number(expected), _number(answer)
    return wanted is not None and wanted == got


def _plain(text: str) -> str:
    inside = boxed(text)
    return (text if inside is None else inside).strip().removesuffix(".").strip()


def _number(text: str) -> Fraction | None:
    plain = _plain(text).replace(",", "").replace("_", "")
    if len(plain) > _LONGEST_NUMBER or "e" in plain.lower():  # 1e999999999 would take all memory
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def jsonl_grader(problems: Sequence[Problem], settings: ProblemSettings, limits: Limits) -> JsonlGrader:
    """What compares the answers of a file. Raises UserError for an answer that it couldn't compare with."""
    judge = settings.judge
    tests = [problem for problem in problems if "tests" in problem.reference]
    if judge == "auto":
        numbers = all("answer" in p.reference and _number(p.reference["answer"]) is not None for p in problems)
        judge = "code" if len(tests) == len(problems) else "number" if numbers else "math"
    for problem in problems:
        if (judge == "code") != ("tests" in problem.reference):
            has, lacks = ("answer", "tests") if judge == "code" else ("tests", "answer")
            raise UserError(f"{problem.where}: it has {has} and no {lacks}, which judge = {judge} compares with")
        if judge == "number" and _number(problem.reference["answer"]) is None:
            raise UserError(f"{problem.where}: answer {shown(problem.reference['answer'])} is no number")
    if judge == "math":
        return _checked_mathematics(problems, limits, f"{settings.table}.judge")
    if judge == "code":
        return _Programs(limits)
    return _Compared(same_number if judge == "number" else same_text)


def _checked_mathematics(problems: Sequence[Problem], limits: Limits, key: str) -> _Mathematics:
    """Every expected answer is compared with itself once: one that can't be read is found before the run."""
    grader = _Mathematics(limits)
    grades = grader.grade([(problem.reference, problem.reference["answer"]) for problem in problems])
    for problem, grade in zip(problems, grades, strict=True):
        if not grade.correct:
            answer = shown(problem.reference["answer"])
            grader.close()
            raise UserError(
                f"{problem.where}: math-verify can't read the answer {answer}; write it in LaTeX between dollar signs,"
                f" or --set {key}=exact"
            )
    return grader
