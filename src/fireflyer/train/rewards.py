"""Rewards: what the graders said of an answer, and whether it has the form asked for, apart and then added up.

The form is R1's: one thought between `<think>` and `</think>`, then an answer, then the end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fireflyer.text.special_tokens import THINK_BEGIN, THINK_END
from fireflyer.train.environments import Environment
from fireflyer.train.judges import Grade, Problem


@dataclass(frozen=True)
class Reward:
    """One answer's. `graded` is False where its grader failed: it then has no reward. `note` says why.

    answer: the grader's, 1 for right in most environments; format: 1 or 0; correct: whether it counts as right.
    """

    answer: float
    format: float
    total: float
    correct: bool
    graded: bool
    note: str


def well_formed(prompt: str, reply: str, ended: bool) -> bool:
    """Whether a reply is one thought, an answer and the end. `prompt` may have opened the thought already."""
    whole = THINK_BEGIN + reply if prompt.rstrip().endswith(THINK_BEGIN) else reply
    _, closed, answer = whole.lstrip().removeprefix(THINK_BEGIN).partition(THINK_END)
    once = whole.count(THINK_BEGIN) == 1 == whole.count(THINK_END)
    return ended and once and bool(closed) and whole.lstrip().startswith(THINK_BEGIN) and bool(answer.strip())


def final_answer(prompt: str, reply: str) -> str:
    """What follows the thought; the whole reply where there is none, and "" where it never ends."""
    before, closed, answer = reply.rpartition(THINK_END)
    if closed:
        return answer.strip()
    return "" if THINK_BEGIN in before + answer or prompt.rstrip().endswith(THINK_BEGIN) else reply.strip()


def judge(
    environment: Environment,
    replies: Sequence[tuple[Problem, str, str, bool]],
    *,
    answer_weight: float,
    format_weight: float,
) -> list[Reward]:
    """The rewards of (problem, prompt, reply, whether it ended), in order."""
    answers = [final_answer(prompt, reply) for _, prompt, reply, _ in replies]
    grades = environment.grade([problem for problem, *_ in replies], answers)
    return [
        _reward(grade, float(well_formed(prompt, reply, ended)), answer_weight, format_weight)
        for grade, (_, prompt, reply, ended) in zip(grades, replies, strict=True)
    ]


def _reward(grade: Grade, form: float, answer_weight: float, format_weight: float) -> Reward:
    if grade.correct is None:
        return Reward(0.0, form, 0.0, correct=False, graded=False, note=grade.note)
    total = answer_weight * grade.reward + format_weight * form
    return Reward(grade.reward, form, total, grade.correct, graded=True, note=grade.note)
