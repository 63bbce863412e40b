"""Whether an answer is right: of a problem and a text, a reward between 0 and 1, and a note that says why.

In: problems (the objects of a JSONL file: `problem`, `answer`, ...) and what a model wrote. Out: a `Grade` each. What
goes wrong while grading (a hang, a crash, NaN) is a grade of 0 with a note, never an exception (report 5.1, R1 2.2.2:
rules instead of a reward model wherever rules can tell).
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fireflyer.errors import UserError
from fireflyer.evaluate.answers import (
    choice_letter,
    code_block,
    last_line,
    last_number,
    same_number,
    without_thinking,
)
from fireflyer.evaluate.sandbox import Limits, Outcome, Sandbox

Problem = Mapping[str, Any]

_UNFINISHED = "its thinking never ended"
_MATH_LIMITS = Limits(seconds=10.0, memory_mib=2048)


@dataclass(frozen=True)
class Grade:
    """reward: 0 to 1. correct: None where a reward is no verdict (it lies between). note: why, "" where there is
    nothing to say. answer: what was read out of the text."""

    reward: float
    correct: bool | None
    note: str = ""
    answer: str = ""


class Grader(Protocol):
    """Judges many answers at once."""

    name: str

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        """One grade for each text; `problems` are as many. Never raises for what a text holds."""
        ...

    def close(self) -> None:
        """End the processes that grade."""
        ...


class _Plain(ABC):
    """A grader that compares in this process."""

    name: str

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        return [self._one(problem, text) for problem, text in zip(problems, texts, strict=True)]

    def _one(self, problem: Problem, text: str) -> Grade:
        answer = without_thinking(text)
        return _verdict(False, _UNFINISHED) if answer is None else self._compare(str(problem["answer"]), answer)

    @abstractmethod
    def _compare(self, expected: str, answer: str) -> Grade: ...

    def close(self) -> None:  # noqa: B027 (nothing is open, and that is all there is to say)
        """Nothing is open."""


class ExactMatch(_Plain):
    """The whole answer, or its last line, is the expected text; spaces around don't count."""

    name = "exact"

    def _compare(self, expected: str, answer: str) -> Grade:
        line = last_line(answer)
        return _verdict(expected.strip() in (answer.strip(), line), "", line)


class ContainedMatch(_Plain):
    """The expected words stand in the answer, one after the other, in capitals or not."""

    name = "contains"

    def _compare(self, expected: str, answer: str) -> Grade:
        wanted, found = (re.findall(r"\w+", text.lower()) for text in (expected, answer))
        places = range(len(found) - len(wanted) + 1)
        inside = any(found[place : place + len(wanted)] == wanted for place in places)
        return _verdict(inside, "", last_line(answer))


class NumberMatch(_Plain):
    """The number the answer ends in (after ####, in \\boxed{}, else the last one) equals the expected one's."""

    name = "number"

    def _compare(self, expected: str, answer: str) -> Grade:
        wanted, found = last_number(expected), last_number(answer)
        if found is None:
            return _verdict(False, "no number in the answer")
        return _verdict(wanted is not None and same_number(wanted, found), "", found)


class ChoiceMatch(_Plain):
    """The letter the answer settles on is the expected one."""

    name = "choice"

    def _compare(self, expected: str, answer: str) -> Grade:
        found = choice_letter(answer)
        if found is None:
            return _verdict(False, "no choice in the answer")
        return _verdict(found == expected.strip().upper(), "", found)


class _Apart:
    """A grader whose work is done in a sandbox, opened here so that what can't work is known before a run."""

    name: str

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox.__enter__()

    def close(self) -> None:
        self._sandbox.close()


class _OneJobEach(_Apart, ABC):
    """For each answer that is there, one job, judged by how it ended."""

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        answers = [without_thinking(text) for text in texts]
        jobs = [
            self._job(problem, answer) for problem, answer in zip(problems, answers, strict=True) if answer is not None
        ]
        outcomes = iter(self._sandbox.run(jobs))
        return [
            _verdict(False, _UNFINISHED) if answer is None else self._judge(answer, next(outcomes))
            for answer in answers
        ]

    @abstractmethod
    def _job(self, problem: Problem, answer: str) -> tuple[str, str]: ...

    @abstractmethod
    def _judge(self, answer: str, outcome: Outcome) -> Grade: ...


class MathMatch(_OneJobEach):
    """Equal as mathematics, by math-verify (the extra `reason`), run apart because some expressions never end."""

    name = "math"

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        super().__init__(Sandbox("math", limits or _MATH_LIMITS, workers))

    def _job(self, problem: Problem, answer: str) -> tuple[str, str]:
        expected = str(problem["answer"])
        return (expected if "\\boxed" in expected or "$" in expected else f"${expected}$"), answer

    def _judge(self, answer: str, outcome: Outcome) -> Grade:
        if outcome.status != "done":
            return _verdict(False, f"math-verify: {outcome.note}")
        equal, read = outcome.value
        return _verdict(equal, "" if read else "nothing to read in the answer", read[0] if read else "")


class CodeTests(_Apart):
    """Python that passes the problem's tests.

    Two published forms: HumanEval's (`prompt`, `test` with a function `check`, `entry_point`), where the tests run in
    the answer's own process, so that code that looks for it could forge its success; and programs judged by what they
    print (`tests`: a list of {"input", "output"}), where it could not. All tests of a problem must pass.
    """

    name = "code"

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        super().__init__(Sandbox("program", limits, workers))

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        answers = [without_thinking(text) for text in texts]
        jobs: list[tuple[str, str]] = []
        spans: list[tuple[int, int]] = []
        for problem, answer in zip(problems, answers, strict=True):
            begin = len(jobs)
            jobs += [] if answer is None else _programs(problem, code_block(answer))
            spans.append((begin, len(jobs)))
        outcomes = self._sandbox.run(jobs)
        return [
            _verdict(False, _UNFINISHED) if answer is None else _passed(problem, outcomes[begin:end])
            for problem, answer, (begin, end) in zip(problems, answers, spans, strict=True)
        ]


class FileGrader(_OneJobEach):
    """The user's own Python file with `grade(problem, answer) -> float`, 0 to 1: problem is the JSONL file's object."""

    def __init__(self, path: Path, limits: Limits | None = None, workers: int | None = None) -> None:
        self.name = str(path)
        super().__init__(Sandbox(path, limits, workers))

    def _job(self, problem: Problem, answer: str) -> tuple[str, str]:
        return json.dumps(dict(problem)), answer

    def _judge(self, answer: str, outcome: Outcome) -> Grade:
        if outcome.status != "done":
            return _verdict(False, f"{self.name}: {outcome.note}")
        reward = outcome.value
        if not (math.isfinite(reward) and 0.0 <= reward <= 1.0):
            return _verdict(False, f"{self.name}: grade returned {reward}; it must lie between 0 and 1")
        return Grade(reward, None if 0.0 < reward < 1.0 else reward == 1.0, answer=last_line(answer))


NAMES = ("exact", "contains", "number", "choice", "math", "code")


def open_grader(name: str, limits: Limits | None = None, workers: int | None = None) -> Grader:
    """By its name, or by the path of a Python file. Raises UserError for one that isn't there or can't work here."""
    if name.endswith(".py"):
        return FileGrader(Path(name), limits, workers)
    if name == "math":
        return MathMatch(limits, workers)
    if name == "code":
        return CodeTests(limits, workers)
    for plain in (ExactMatch, ContainedMatch, NumberMatch, ChoiceMatch):
        if plain.name == name:
            return plain()
    close = get_close_matches(name, NAMES, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"unknown grader {name!r}; {guess}There are {', '.join(NAMES)}, or the path of a Python file (.py)")


def _verdict(correct: bool, note: str, answer: str = "") -> Grade:
    return Grade(float(correct), correct, note, answer)


def _programs(problem: Problem, code: str) -> list[tuple[str, str]]:
    """(code, stdin) of each test."""
    if "tests" in problem:
        return [(code, str(test["input"])) for test in problem["tests"]]
    prompt, entry_point = problem["prompt"], problem["entry_point"]
    # A model answers with the whole function, or goes on where the prompt stopped.
    whole = code if f"def {entry_point}" in code else prompt + code
    if whole is code:
        whole = _imports(prompt) + code
    return [(f"{whole}\n\n{problem['test']}\n\ncheck({entry_point})\n", "")]


def _imports(prompt: str) -> str:
    return "".join(f"{line}\n" for line in prompt.splitlines() if line.startswith(("import ", "from ")))


def _passed(problem: Problem, outcomes: Sequence[Outcome]) -> Grade:
    expected = [str(test["output"]) for test in problem["tests"]] if "tests" in problem else [None]
    if not outcomes:
        return _verdict(False, "the problem has no tests")
    for number, (outcome, wanted) in enumerate(zip(outcomes, expected, strict=True), start=1):
        which = f"test {number} of {len(outcomes)}: " if wanted is not None else ""
        ended = outcome.status == "done" or (wanted is not None and outcome.status == "exited" and outcome.code == 0)
        if not ended:
            return _verdict(False, which + outcome.note)
        if wanted is not None and _lines(outcome.stdout) != _lines(wanted):
            return _verdict(False, f"{which}printed {outcome.stdout.strip()!r:.60} for {wanted.strip()!r:.60}")
    return _verdict(True, "")


def _lines(text: str) -> list[str]:
    """As judges of contests compare: spaces at the ends of lines and blank lines at the end don't count."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


class Graders:
    """Several graders, opened on demand and closed together."""

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        self._limits, self._workers = limits, workers
        self._open: dict[str, Grader] = {}

    def get(self, name: str) -> Grader:
        """As `open_grader`, opened once."""
        if name not in self._open:
            self._open[name] = open_grader(name, self._limits, self._workers)
        return self._open[name]

    def __enter__(self) -> Graders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for grader in self._open.values():
            grader.close()
