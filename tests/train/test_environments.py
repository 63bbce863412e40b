"""Environments: what is found before a run, and that no grader can do more than cost one answer its grade."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fireflyer.errors import UserError
from fireflyer.train.environments import open_environment
from fireflyer.train.judges import Grade, same_number, same_text
from fireflyer.train.post_training_settings import GrpoSettings


def _jsonl(folder: Path, *rows: object) -> str:
    path = folder / "problems.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def _refusal(settings: GrpoSettings) -> str:
    with pytest.raises(UserError) as refused:
        open_environment(settings, 0)
    return str(refused.value)


def _grade(settings: GrpoSettings, *answers: str) -> list[Grade]:
    environment = open_environment(settings, 0)
    try:
        return environment.grade([environment.problem(i % 2) for i in range(len(answers))], answers)
    finally:
        environment.close()


@pytest.mark.parametrize(
    ("expected", "answer", "equal"),
    [
        ("12", " 012. ", True),
        ("1,000", "1000.0", True),
        ("0.5", "1/2", True),
        ("3", r"\boxed{3}", True),
        *(("3", answer, False) for answer in ("4", "", "three", "1/0", "3e0", "9" * 1000, "nan")),
    ],
)
def test_numbers(expected: str, answer: str, equal: bool):
    assert same_number(expected, answer) == equal


def test_text_and_code():
    assert same_text(" Paris", r"\boxed{Paris}.")
    assert not same_text("Paris", "London")


def test_a_jsonl_of_numbers_is_judged_as_numbers(tmp_path: Path):
    path = _jsonl(tmp_path, {"problem": "1+1", "answer": 2}, "", {"problem": "2+2", "answer": "4"})
    grades = _grade(GrpoSettings(environment=path), "2", "5", "two", "4.0")
    assert [grade.correct for grade in grades] == [True, False, False, True]
    assert open_environment(GrpoSettings(environment=path), 0).problem(1).where == f"{path}, line 3"


def test_mathematics_is_judged_by_math_verify(tmp_path: Path):
    path = _jsonl(tmp_path, {"problem": "a", "answer": r"$\frac{1}{2}$"}, {"problem": "b", "answer": "$x+1$"})
    grades = _grade(GrpoSettings(environment=path), r"\boxed{0.5}", "$1+x$", "no idea", "$x+2$")
    assert [(grade.correct, grade.reward) for grade in grades] == [(True, 1), (True, 1), (False, 0), (False, 0)]


def test_code_is_judged_by_its_tests_and_what_it_does_wrong_is_its_own_fault(tmp_path: Path):
    row = {"problem": "write f", "tests": "assert f(2) == 4"}
    path = _jsonl(tmp_path, row, row)
    right = "def f(x): return 2 * x"
    grades = _grade(
        GrpoSettings(environment=path, grade_timeout_s=1.0),
        *(
            right,
            f"```python\n{right}\n```",
            "def f(x): return x",
            "while True: pass",
            "exit(0)",
            "import os; os._exit(0)",
        ),
    )
    assert [grade.correct for grade in grades] == [True, True, False, False, False, False]
    assert "ran longer than 1 s" in grades[3].note


GRADER = """
import os, time
PROBLEMS = [{"problem": "say yes", "wanted": "yes"}, {"problem": "say no", "wanted": "no"}]

def grade(problem, answer):
    if answer == "hang":
        time.sleep(1000)
    if answer == "crash":
        os._exit(3)
    if answer == "raise":
        raise RuntimeError("no such luck")
    return {"nan": float("nan"), "five": 5, "text": "1"}.get(answer, float(answer == problem["wanted"]))
"""


def test_a_python_file_grades_and_its_failures_cost_only_their_own_answer(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(GRADER, encoding="utf-8")
    settings = GrpoSettings(environment=str(path), grade_timeout_s=1.0)
    grades = _grade(settings, "yes", "no", "hang", "crash", "raise", "nan", "five", "text", "yes", "yes")
    assert [grade.correct for grade in grades] == [True, True, *[None] * 6, True, False]
    notes = [grade.note for grade in grades[2:8]]
    for words, note in zip(
        [
            "ran longer",
            "exit code 3",
            "no such luck",
            "nan, which is not in 0 to 1",
            "5.0, which is not in",
            "not a number",
        ],
        notes,
        strict=True,
    ):
        assert words in note
        assert "PROBLEMS[" in note


def test_reasoning_gym_by_name(tmp_path: Path):
    settings = GrpoSettings(environment="chain_sum", options=["max_terms=3", "max_digits=1"])
    environment = open_environment(settings, 5)
    problems = [environment.problem(index) for index in (0, 1, 0)]
    assert problems[0] == problems[2] != problems[1]
    assert open_environment(settings, 6).problem(0) != problems[0]
    answers = [problems[0].reference["entry"]["answer"], "nonsense"]
    try:
        grades = environment.grade(problems[:2], answers)
    finally:
        environment.close()
    assert [(grade.correct, grade.reward) for grade in grades] == [(True, 1.0), (False, 0.0)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no environment: give --env"),
        ({"environment": "chain_sums"}, "did you mean chain_sum?"),
        ({"environment": "qqqqqqqq"}, "its names: ab, "),
        ({"environment": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"environment": "chain_sum", "options": ["terms"]}, "'terms', which is not KEY=VALUE"),
        ({"environment": "chain_sum", "options": ["max_terms=0"]}, "grpo.options = ['max_terms=0']"),
        ({"environment": "chain_sum", "options": ["max_term=3"]}, "max_term"),
    ],
)
def test_what_is_wrong_with_a_name(settings: dict, words: str):
    assert words in _refusal(GrpoSettings(**settings))


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([], {}, "no problems in it"),
        ([{"problem": "a", "answer": "1"}, "{"], {}, "line 2: not JSON"),
        ([[1]], {}, "line 1: [1] is no object"),
        ([{"problem": "a"}], {}, "line 1: no answer; add one"),
        ([{"answer": "1"}], {}, "line 1: problem is"),
        ([{"problem": "a", "answer": None}], {}, "line 1: answer is"),
        ([{"problem": "a", "answer": "two"}], {"judge": "number"}, "answer 'two' is no number"),
        ([{"problem": "a", "answer": "1"}], {"judge": "code"}, "it has answer and no tests"),
        ([{"problem": "a", "tests": "1"}], {"judge": "exact"}, "it has tests and no answer"),
        ([{"problem": "a", "answer": "word"}], {"judge": "math"}, "line 1: math-verify can't read the answer 'word'"),
        ([{"problem": "a", "answer": "1"}], {"options": ["x=1"]}, "not for a file"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, rows: list, settings: dict, words: str):
    assert words in _refusal(GrpoSettings(environment=_jsonl(tmp_path, *rows), **settings))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def grade(problem, answer): return 1", "it needs PROBLEMS"),
        ("PROBLEMS = [{'problem': 'a'}]", "no function grade"),
        ("PROBLEMS = [{'text': 'a'}]\ndef grade(problem, answer): return 1", "PROBLEMS[0]: problem is"),
        ("REWARD_RANGE = (1, 0)\nPROBLEMS = [{'problem': 'a'}]\ndef grade(problem, answer): return 1", "REWARD_RANGE"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
    ],
)
def test_what_is_wrong_with_a_python_file(tmp_path: Path, text: str, words: str):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    assert words in _refusal(GrpoSettings(environment=str(path)))
