"""The published forms of files, and what is said about rows that don't have them."""

from __future__ import annotations

import json

import pytest

from fireflyer.errors import UserError
from fireflyer.evaluate.problems import gsm8k, human_eval, multiple_choice, plain, read_items
from fireflyer.evaluate.tasks import TASKS, choice_texts, examples_for, find_task, prompt


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_gsm8k(tmp_path):
    row = {"question": "How many?", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"}
    (item,) = read_items(lines(tmp_path / "a.jsonl", row), gsm8k)
    assert item.problem["answer"] == "1024"
    assert item.solution == "48/2 = 24\n#### 1,024"
    shown = prompt(TASKS["gsm8k"], item, "plain", [item])
    assert shown == "Question: How many?\nAnswer: 48/2 = 24\n#### 1,024\n\nQuestion: How many?\nAnswer:"


def test_math_500_and_aime(tmp_path):
    rows = [
        {"problem": "Braces {question} stay.", "answer": "\\frac{1}{2}", "solution": "so", "unique_id": "test/1.json"},
        {"Problem": "AIME's", "Answer": 204},
    ]
    first, second = read_items(lines(tmp_path / "a.jsonl", *rows), plain)
    assert (first.id, first.problem["answer"], second.problem["answer"]) == ("test/1.json", "\\frac{1}{2}", "204")
    assert prompt(TASKS["math-500"], first, "chat", []) == (
        "Braces {question} stay.\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


def test_mmlu_in_every_form(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "csv").mkdir()
    (tmp_path / "dev" / "high_school_physics_dev.csv").write_text('"One, two?",a,b,c,d,C\n')
    (tmp_path / "csv" / "high_school_physics_test.csv").write_text("Which?,e,f,g,h,B\n")
    (csv_item,) = read_items(tmp_path / "csv", multiple_choice)
    (shown,) = read_items(tmp_path / "dev", multiple_choice)
    rows = [
        {"question": "Which?", "choices": ["e", "f", "g", "h"], "answer": 1, "subject": "high_school_physics"},
        {"question": "Which?", "A": "e", "B": "f", "C": "g", "D": "h", "answer": "b"},
        {"question": "Which?", "choices": {"text": ["e", "f"], "label": ["A", "B"]}, "answerKey": "B"},
        {"ctx": "Which?", "endings": ["e", "f"], "label": "1"},
    ]
    items = read_items(lines(tmp_path / "a.jsonl", *rows), multiple_choice)
    assert [item.label for item in (csv_item, *items)] == [1] * 5
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert read_items(tmp_path / "a.parquet", multiple_choice)[0].choices == ("e", "f", "g", "h")
    context, letters = choice_texts(TASKS["mmlu"], csv_item, examples_for(TASKS["mmlu"], csv_item, [shown], 5))
    assert context == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "One, two?\nA. a\nB. b\nC. c\nD. d\nAnswer: C\n\nWhich?\nA. e\nB. f\nC. g\nD. h\nAnswer:"
    )
    assert letters == [" A", " B", " C", " D"]


def test_humaneval(tmp_path):
    row = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): ...\n"}
    (item,) = read_items(lines(tmp_path / "a.jsonl", row), human_eval)
    assert item.id == "HumanEval/0"
    assert prompt(TASKS["humaneval"], item, "plain", []) == "def f():\n"


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        (gsm8k, {"question": "?", "answer": "many"}, "line 1: the answer 'many' has no number"),
        (gsm8k, {"query": "?"}, "line 1: no question \\(its keys are query\\)"),
        (plain, {"problem": "?", "answer": None}, "line 1: answer is None"),
        (plain, ["?"], "line 1: \\['\\?'\\] is no object"),
        (multiple_choice, {"question": "?", "choices": ["a"], "answer": 0}, "line 1: choices is \\['a'\\]"),
        (multiple_choice, {"question": "?", "choices": ["a", "b"], "answer": "C"}, "line 1: answer is 2"),
        (human_eval, {"prompt": "?", "test": "?"}, "line 1: no entry_point"),
        (human_eval, {"problem": "?", "tests": [{"input": "1"}]}, "line 1: tests is"),
    ],
)
def test_wrong_rows(tmp_path, form, row, reason):
    with pytest.raises(UserError, match=reason):
        read_items(lines(tmp_path / "a.jsonl", row), form)


def test_wrong_files(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"problem": "?", "answer": 1}\n{"problem"\n')
    (tmp_path / "torn.csv").write_text("Which?,e,f,g,h,B\nWhich?,e,f\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, reason in (
        ("broken.jsonl", "line 2: not JSON"),
        ("torn.csv", "row 2: 3 cells; 6 are expected"),
        ("empty.jsonl", "no problems"),
        ("absent.jsonl", "no such file"),
    ):
        with pytest.raises(UserError, match=reason):
            read_items(tmp_path / name, multiple_choice if name.endswith("csv") else plain)


def test_unknown_tasks():
    with pytest.raises(UserError, match="did you mean gsm8k"):
        find_task("gsm8")
    with pytest.raises(UserError, match="--tasks hellaswag --model_args"):
        find_task("lm-eval:hellaswag")
