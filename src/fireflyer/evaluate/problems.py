"""Problems out of local files in the forms in which benchmarks are published.

In: .jsonl, .json (a list), .csv or .parquet. Out: `Item`s. Every row is checked before anything is asked of a model: an
error names file, row and reason.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.evaluate.answers import last_number

_MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_QUESTIONS = ("problem", "question", "prompt", "context", "Problem", "Question", "query", "ctx")
_ANSWERS = ("answer", "Answer", "expected_answer", "target")
_CHOICES = ("choices", "options", "endings")
_LABELS = ("answer", "label", "gold", "answerKey", "target")
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Item:
    """One problem.

    id: its row, or the name that it brings. question: what is asked. problem: what a grader reads. solution: what an
    example shows as the answer. choices and label: of a multiple choice, and which is right. subject: of its group.
    """

    id: str
    question: str
    problem: Mapping[str, Any]
    solution: str = ""
    choices: tuple[str, ...] = ()
    label: int = -1
    subject: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a file; `where`: for messages."""

    where: str
    values: Mapping[str, Any]

    def text(self, *keys: str) -> str:
        """The first of these keys that is there, as text. Raises UserError."""
        for key in keys:
            value = self.values.get(key)
            if isinstance(value, bool):
                break
            if isinstance(value, (str, int, float)) and str(value).strip():
                return str(value)
        found = next((f"{key} is {shown(self.values[key])}" for key in keys if key in self.values), None)
        has = f"its keys are {', '.join(map(str, self.values)) or 'none'}"
        raise UserError(f"{self.where}: {found or f'no {keys[0]} ({has})'}; it must be a text")


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, or of all files of a folder. Raises UserError for what can't be read."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS)
        if not files:
            raise UserError(f"{path}: no {', '.join(_READERS)} in this folder")
        for file in files:
            yield from read_rows(file)
        return
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix not in _READERS:
        raise UserError(f"{path}: problems are read from {', '.join(_READERS)}; convert it")
    yield from _READERS[path.suffix](path)


def gsm8k(row: Row) -> Item:
    """{"question", "answer": "... #### 42"}."""
    question, solution = row.text("question", "problem"), row.text("answer")
    if last_number(solution) is None:
        raise UserError(f"{row.where}: the answer {shown(solution)} has no number; GSM8K's end in #### and a number")
    final = last_number(solution)
    return Item(row.where, question, {"problem": question, "answer": final}, _gsm8k_solution(solution))


def plain(row: Row) -> Item:
    """{"problem", "answer"}, as MATH-500, AIME and any list of questions and answers have it."""
    question, answer = row.text(*_QUESTIONS), row.text(*_ANSWERS)
    name = str(row.values.get("unique_id") or row.where)
    problem = {**row.values, "problem": question, "answer": answer}
    solution = row.values.get("solution")
    return Item(name, question, problem, solution if isinstance(solution, str) else answer)


def human_eval(row: Row) -> Item:
    """{"task_id", "prompt", "entry_point", "test"}; or any "problem" with "tests", a list of {"input", "output"}."""
    tests = row.values.get("tests")
    if tests is not None:
        whole = isinstance(tests, list) and all(
            isinstance(test, dict) and {"input", "output"} <= set(test) for test in tests
        )
        if not whole or not tests:
            raise UserError(f"{row.where}: tests is {shown(tests)}; it must be a list of objects with input and output")
        question = row.text(*_QUESTIONS)
        return Item(row.where, question, {"problem": question, "tests": tests})
    prompt, entry_point, test = row.text("prompt"), row.text("entry_point"), row.text("test")
    problem = {"prompt": prompt, "entry_point": entry_point, "test": test}
    return Item(str(row.values.get("task_id") or row.where), prompt, problem)


def multiple_choice(row: Row) -> Item:
    """{"question", "choices": [...], "answer": 2 or "C"}; MMLU's csv, and MMLU-Pro's and ARC's jsonl, too."""
    question, choices = row.text(*_QUESTIONS), _choices(row)
    label = _label(row, choices)
    subject = str(row.values.get("subject") or row.values.get("category") or "").replace("_", " ")
    problem = {"problem": question, "answer": LETTERS[label]}
    return Item(row.where, question, problem, choices=choices, label=label, subject=subject)


def read_items(path: Path, form: Callable[[Row], Item]) -> list[Item]:
    """All problems of a file or folder in one form. Raises UserError with row and reason."""
    items = [form(row) for row in read_rows(path)]
    if not items:
        raise UserError(f"{path}: no problems in it")
    return items


def _gsm8k_solution(solution: str) -> str:
    """Without the calculator's marks, <<6*7=42>>."""
    return re.sub(r"<<[^<>]*>>", "", solution)


def _choices(row: Row) -> tuple[str, ...]:
    value: Any = next((row.values[key] for key in _CHOICES if key in row.values), None)
    if value is None and all(letter in row.values for letter in "ABCD"):
        value = [row.values[letter] for letter in LETTERS if letter in row.values]
    if isinstance(value, Mapping):  # ARC: {"text": [...], "label": [...]}
        value = value.get("text")
    if isinstance(value, Sequence) and not isinstance(value, str):
        texts = tuple(str(choice) for choice in value)
        if 2 <= len(texts) <= len(LETTERS) and all(text.strip() for text in texts):
            return texts
    raise UserError(f"{row.where}: choices is {shown(value)}; it must be a list of 2 to {len(LETTERS)} texts")


def _label(row: Row, choices: tuple[str, ...]) -> int:
    value: Any = next((row.values[key] for key in _LABELS if key in row.values), None)
    if isinstance(value, str):
        text = value.strip()
        if len(text) == 1 and text.upper() in LETTERS:
            value = LETTERS.index(text.upper())
        elif text in choices:
            value = choices.index(text)
        elif text.isdecimal():
            value = int(text)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    wanted = f"a letter up to {LETTERS[len(choices) - 1]}, an index below {len(choices)}, or one of the choices"
    raise UserError(f"{row.where}: answer is {shown(value)}; it must be {wanted}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{where}: not JSON ({error})") from None
                yield _row(where, value)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: it holds {shown(values)}; it must be a list of objects")
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}, entry {number}", value)


def _read_csv(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from None
    # MMLU's own files have no line of names: six columns, of which the last is a letter.
    named = bool(rows) and not (len(rows[0]) == 6 and rows[0][5].strip() in LETTERS)
    names = rows[0] if named else list(_MMLU_COLUMNS)
    for number, cells in enumerate(rows[named:], start=1 + named):
        where = f"{path}, row {number}"
        if len(cells) != len(names):
            raise UserError(f"{where}: {len(cells)} cells; {len(names)} are expected ({', '.join(names)})")
        values = dict(zip(names, cells, strict=True))
        subject = path.stem.removesuffix("_test").removesuffix("_dev").removesuffix("_val")
        yield _row(where, values if named else {"subject": subject, **values})


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow: pip install 'fireflyer[parquet]'") from None
    try:
        values = pq.read_table(path).to_pylist()
    except Exception as error:  # pyarrow's errors share no base class
        raise UserError(f"{path}: can't be read as parquet: {str(error).splitlines()[0]}") from None
    for number, value in enumerate(values, start=1):
        yield _row(f"{path}, row {number}", value)


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: {shown(value)} is no object with keys and values")
    return Row(where, value)


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
