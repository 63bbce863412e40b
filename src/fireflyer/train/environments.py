"""Where reinforcement learning gets its problems and its verdicts: reasoning-gym by name, a JSONL file, a Python file.

In: `--env NAME|FILE`. Out: an `Environment`: numbered problems, and grades of answers to them. Everything that a file
or a name can be wrong in is found when it is opened, with its line. Grading runs apart, with limits of time and memory
(evaluate/sandbox.py): what goes wrong there costs that answer its grade and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fireflyer.config.messages import nearest, shown
from fireflyer.errors import UserError
from fireflyer.evaluate.sandbox import Limits, Outcome, Sandbox
from fireflyer.train.judges import Grade, Problem, how_it_ended, jsonl_grader
from fireflyer.train.post_training_settings import ProblemSettings


class Environment(Protocol):
    """Problems 0 to num_problems - 1 (None: without end), the same ones each time."""

    name: str
    num_problems: int | None

    def fingerprint(self) -> str:
        """Changes with the problems."""
        ...

    def problem(self, index: int) -> Problem: ...

    def grade(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[Grade]:
        """One grade for each answer; one whose grading failed has `correct` None and a note."""
        ...

    def close(self) -> None:
        """End the processes that grade."""
        ...


def open_environment(settings: ProblemSettings, seed: int) -> Environment:
    """Raises UserError for what is wrong with the name or the file, with its line and reason."""
    name, limits = settings.environment, Limits(settings.grade_timeout_s, settings.grade_memory_mib)
    if not name:
        raise UserError("no environment: give --env NAME (of reasoning-gym) or --env FILE (.jsonl or .py)")
    path = Path(name)
    if path.suffix == ".jsonl" or path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"--env {name}: no such file")
        if settings.options:
            raise UserError(
                f"{settings.table}.options = {settings.options} is for reasoning-gym's data sets, not for a file"
            )
        return JsonlEnvironment(path, settings, limits) if path.suffix == ".jsonl" else PythonFile(path, limits)
    if path.exists():
        raise UserError(f"--env {name}: a file of problems must end in .jsonl, a grader of your own in .py")
    return ReasoningGym(settings, seed, limits)


class JsonlEnvironment:
    """Lines of {"problem": ..., "answer": ...}, or with "tests" instead of "answer" for code."""

    def __init__(self, path: Path, settings: ProblemSettings, limits: Limits) -> None:
        self.name = str(path)
        self._sha256, self._problems = _read_problems(path)
        self.num_problems: int | None = len(self._problems)
        self._grader = jsonl_grader(self._problems, settings, limits)

    def fingerprint(self) -> str:
        return self._sha256

    def problem(self, index: int) -> Problem:
        return self._problems[index]

    def grade(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[Grade]:
        return self._grader.grade([(p.reference, answer) for p, answer in zip(problems, answers, strict=True)])

    def close(self) -> None:
        self._grader.close()


class PythonFile:
    """A file with `PROBLEMS`, a list of dictionaries with "problem" in each, and `grade(problem, answer)`.

    What else a problem holds is for `grade`, which gets it whole and gives a number in the file's `REWARD_RANGE`, 0 to
    1 where it names none; a reward of at least the range's end counts as right.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.name = str(path)
        self._sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        entries, self._low, self._high = _load_python(path, limits)
        self._problems = [
            Problem(_text_of(entry, "problem", f"{path}, PROBLEMS[{i}]"), entry, f"{path}, PROBLEMS[{i}]")
            for i, entry in enumerate(entries)
        ]
        self.num_problems: int | None = len(self._problems)
        self._sandbox = Sandbox(path, limits)
        with self._sandbox:
            pass  # that it loads and has its function is seen before the run

    def fingerprint(self) -> str:
        return self._sha256

    def problem(self, index: int) -> Problem:
        return self._problems[index]

    def grade(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[Grade]:
        return _scored(self._sandbox, problems, answers, self._low, self._high)

    def close(self) -> None:
        self._sandbox.close()


class ReasoningGym:
    """A data set of reasoning-gym: problem i is a function of the seed and i."""

    num_problems: int | None = None

    def __init__(self, settings: ProblemSettings, seed: int, limits: Limits) -> None:
        self.name = settings.environment
        self._fingerprint = json.dumps([self.name, settings.options, seed])
        self._dataset = _create_dataset(settings, seed)
        self._sandbox = Sandbox(Path(__file__).with_name("reasoning_gym_grader.py"), limits)

    def fingerprint(self) -> str:
        return self._fingerprint

    def problem(self, index: int) -> Problem:
        entry = self._dataset[index]
        return Problem(entry["question"], {"name": self.name, "entry": entry}, f"{self.name}, problem {index}")

    def grade(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[Grade]:
        return _scored(self._sandbox, problems, answers, 0.0, 1.0)

    def close(self) -> None:
        self._sandbox.close()


def _read_problems(path: Path) -> tuple[str, list[Problem]]:
    """The file's hash and its problems. Raises UserError with the line."""
    data = path.read_bytes()
    problems = []
    for number, line in enumerate(data.splitlines(), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); each line is an object with problem and answer") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {shown(entry)} is no object; each line is one with problem and answer")
        wanted = "tests" if "tests" in entry else "answer"
        if wanted not in entry:
            raise UserError(f"{where}: no answer; add one, or tests for a problem of programming")
        problems.append(Problem(_text_of(entry, "problem", where), {wanted: _answer_of(entry, wanted, where)}, where))
    if not problems:
        raise UserError(f"{path}: no problems in it; each line is an object with problem and answer")
    return hashlib.sha256(data).hexdigest(), problems


def _text_of(entry: Any, key: str, where: str) -> str:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} is {shown(value)}; it must be a text")
    return value


def _answer_of(entry: dict[str, Any], key: str, where: str) -> str:
    value = entry[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text_of(entry, key, where)


def _scored(
    sandbox: Sandbox, problems: Sequence[Problem], answers: Sequence[str], low: float, high: float
) -> list[Grade]:
    """Grades of a function that gives numbers. Raises nothing."""
    jobs = [(json.dumps(problem.reference), answer) for problem, answer in zip(problems, answers, strict=True)]
    outcomes = sandbox.run(jobs)
    return [_in_range(outcome, problem, low, high) for outcome, problem in zip(outcomes, problems, strict=True)]


def _in_range(outcome: Outcome, problem: Problem, low: float, high: float) -> Grade:
    if outcome.status != "done":
        return Grade(0.0, None, f"{problem.where}: the grader {how_it_ended(outcome)}")
    if not low <= outcome.value <= high:  # NaN is in no range
        gave = f"{problem.where}: the grader gave {outcome.value}"
        return Grade(0.0, None, f"{gave}, which is not in {low:g} to {high:g}")
    return Grade(outcome.value, outcome.value >= high)


_READ_PROBLEMS = """
import json, sys
sys.path.insert(0, {folder!r})
module = {{"__name__": "problems", "__file__": {path!r}}}
exec(compile(open({path!r}, encoding="utf-8").read(), {path!r}, "exec"), module)
print("\\n" + json.dumps([module.get("PROBLEMS"), list(module.get("REWARD_RANGE", (0, 1)))]))
"""


def _load_python(path: Path, limits: Limits) -> tuple[list[Any], float, float]:
    """PROBLEMS and REWARD_RANGE of a file, read apart. Raises UserError."""
    limits = Limits(max(limits.seconds, 30.0), limits.memory_mib, 1 << 28)
    full = path.resolve()
    with Sandbox("program", limits) as sandbox:
        (outcome,) = sandbox.run([(_READ_PROBLEMS.format(path=str(full), folder=str(full.parent)), "")])
    if outcome.status != "done":
        raise UserError(f"{path}: reading its problems {how_it_ended(outcome)}")
    problems, reward_range = json.loads(outcome.stdout.rsplit("\n", 2)[-2])
    if not isinstance(problems, list) or not problems:
        raise UserError(f'{path}: it needs PROBLEMS, a list of dictionaries with "problem" in each')
    numbers = all(isinstance(x, (int, float)) for x in reward_range)
    if len(reward_range) != 2 or not numbers or not reward_range[0] < reward_range[1]:
        raise UserError(f"{path}: REWARD_RANGE = {reward_range} must be two numbers, the lower one first")
    return problems, float(reward_range[0]), float(reward_range[1])


def _create_dataset(settings: ProblemSettings, seed: int) -> Any:
    name, options = settings.environment, f"{settings.table}.options"
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError(
            f"--env {name}: no such file; problems by name need reasoning-gym: pip install 'fireflyer[reason]'"
        ) from None
    if name not in DATASETS:
        guess = nearest(name, sorted(DATASETS))
        close = f"did you mean {guess}?" if guess else f"its names: {', '.join(sorted(DATASETS))}"
        raise UserError(f"--env {name}: neither a file nor a data set of reasoning-gym; {close}")
    try:
        dataset = create_dataset(name, seed=seed % 2**31, size=2**31, **_parsed(settings.options, options))
        dataset[0]
    except Exception as error:  # its data sets check their settings with assert, TypeError and ValueError alike
        raise UserError(f"--env {name}, {options} = {settings.options}: {error or type(error).__name__}") from error
    return dataset


def _parsed(options: Sequence[str], key_of_recipe: str) -> dict[str, Any]:
    parsed = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise UserError(
                f'{key_of_recipe} has {option!r}, which is not KEY=VALUE; write ["min_terms=2", "max_terms=3"]'
            )
        try:
            parsed[key.strip()] = json.loads(text)
        except ValueError:
            parsed[key.strip()] = text.strip()
    return parsed
