"""Verdicts of each grader; hostile answers and broken graders cost their own sample and nothing else."""

from __future__ import annotations

import pytest

from fireflyer.errors import UserError
from fireflyer.evaluate.graders import Graders, open_grader
from fireflyer.evaluate.sandbox import Limits

ADD = {
    "prompt": 'from typing import List\n\n\ndef add(numbers: List[int]) -> int:\n    """Their sum."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
CANONICAL = "    return sum(numbers)\n"
SUMS = {"problem": "Print the sum.", "tests": [{"input": "1 2\n", "output": "3"}, {"input": "5 5\n", "output": "10\n"}]}


@pytest.fixture(scope="module")
def graders():
    with Graders(Limits(seconds=2.0, memory_mib=256), workers=2) as opened:
        yield opened


def verdicts(grader, problem, *texts):
    return [grade.correct for grade in grader.grade([problem] * len(texts), texts)]


def test_plain_graders(graders):
    exact, contains, number, choice = (graders.get(name) for name in ("exact", "contains", "number", "choice"))
    assert verdicts(exact, {"answer": "blue"}, " blue\n", "It is\nblue", "blue sky") == [True, True, False]
    found = ("They are Amber\nFalcon.", "amber falcon", "amber, falcon!", "falcon amber", "amber falcons", "amber", "")
    assert verdicts(contains, {"answer": "amber falcon"}, *found) == [True, True, True, False, False, False, False]
    assert verdicts(number, {"answer": "#### 1,000"}, "1000.0", "so 999", "none", "<think>1000") == [
        True,
        False,
        False,
        False,
    ]
    assert verdicts(choice, {"answer": "b"}, "Answer: B", "(C)", "?") == [True, False, False]


def test_mathematics(graders):
    """`2/4` and `0.5` for one half; sets, intervals; and what is no mathematics."""
    grader = graders.get("math")
    answers = [r"so \boxed{\frac{2}{4}}", "$0.5$", r"\boxed{0.25}", "no idea", ""]
    assert verdicts(grader, {"answer": r"\frac{1}{2}"}, *answers) == [True, True, False, False, False]
    assert verdicts(grader, {"answer": r"\left( 3, \frac{\pi}{2} \right)"}, r"\boxed{(3, \pi/2)}") == [True]
    unfinished = r"<think>\boxed{0.5} or not"
    assert verdicts(grader, {"answer": "0.5"}, unfinished, unfinished + r"</think>\boxed{0.5}") == [False, True]
    assert verdicts(grader, {"answer": "204"}, r"\boxed{204}", r"\boxed{9^{9^{9^{9}}}}") == [True, False]


def test_humaneval_form(graders):
    code = graders.get("code")
    grades = code.grade(
        [ADD] * 8,
        [
            CANONICAL,
            f"Here:\n```python\ndef add(numbers: List[int]) -> int:\n{CANONICAL}```",
            "    return 3\n",
            "    while True: pass\n",
            "    import sys; sys.exit(0)\n",
            "    import os; os._exit(0)\n",
            "    return bytearray(10**10)\n",
            "    import os\n    while True: os.fork()\n",
        ],
    )
    assert [grade.correct for grade in grades] == [True, True] + [False] * 6
    assert "AssertionError" in grades[2].note
    assert "longer than 2 s" in grades[3].note
    assert "exit code 0" in grades[4].note
    assert "MemoryError" in grades[6].note


def test_programs_by_what_they_print(graders):
    code = graders.get("code")
    right = "print(sum(map(int, input().split())))"
    grades = code.grade([SUMS] * 3, [right, f"{right}\nimport sys; sys.exit(0)", "print(3)"])
    assert [grade.correct for grade in grades] == [True, True, False]
    assert grades[2].note == "test 2 of 2: printed '3' for '10'"


def test_a_file_of_the_users(tmp_path, graders):
    path = tmp_path / "mine.py"
    path.write_text(
        "import time\nfrom words import KNOWN\n"
        "def grade(problem, answer):\n"
        "    if answer == 'hang': time.sleep(60)\n"
        "    if answer == 'crash': import os; os._exit(1)\n"
        "    if answer == 'text': return 'good'\n"
        "    return {'half': 0.5, 'nan': float('nan'), 'two': 2, problem['answer']: 1}[answer]\n"
    )
    (tmp_path / "words.py").write_text("KNOWN = 1\n")
    grader = graders.get(str(path))
    texts = ["yes", "half", "nan", "two", "unknown", "hang", "crash", "text"]
    grades = grader.grade([{"problem": "?", "answer": "yes"}] * len(texts), texts)
    assert [grade.reward for grade in grades] == [1.0, 0.5] + [0.0] * 6
    assert [grade.correct for grade in grades] == [True, None] + [False] * 6
    wanted = ["", "", "nan", "between 0 and 1", "KeyError", "longer than 2 s", "exit code 1", "not a number"]
    assert all(text in grade.note for text, grade in zip(wanted, grades, strict=True))


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean number"):
        open_grader("nmber")
    with pytest.raises(UserError, match="no such file"):
        open_grader("nowhere.py")
