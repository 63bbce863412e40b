"""A folder that holds an evaluation: its settings first, a line a problem as it goes, the scores at the end.

`settings.json` (checkpoint, data, prompts, sampling, versions), `TASK.samples.jsonl`, `results.json`. Nothing in it is
ever overwritten: the same settings go on where they stopped, others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import FileLock, writing
from fireflyer.errors import UserError

_SETTINGS, _RESULTS = "settings.json", "results.json"


def finished_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scores of an evaluation with these settings that has ended in this folder. Writes nothing.

    Raises UserError where the folder holds something else.
    """
    stored = path / _SETTINGS
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; give a folder")
    if path.exists() and not stored.is_file() and any(path.iterdir()):
        raise UserError(f"--out {path}: the folder isn't empty and holds no evaluation; give another")
    if not stored.is_file():
        return None
    _compare(path, _read(stored), json.loads(json.dumps(settings)))
    return _read(path / _RESULTS) if (path / _RESULTS).is_file() else None


class EvaluationFolder:
    """Opened by one process at a time, for settings that `finished_results` has held against it."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        stored = path / _SETTINGS
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(path / ".lock", f"{path} is in use by another evaluation ({{holder}}); wait for it")
        if not stored.is_file():
            with writing(stored):
                write_text(stored, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Ends the evaluation."""
        self.write(_RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """A file of the folder, whole or not at all."""
        with writing(self.path / name):
            write_text(self.path / name, text)

    def records(self, task: str) -> dict[int, dict[str, Any]]:
        """What is there of a task, by number of the problem; a torn last line is dropped from the file too."""
        path = self._samples(task)
        if not path.is_file():
            return {}
        found = list(_whole_lines(path))
        whole = b"".join(line for line, _ in found)
        if len(whole) != path.stat().st_size:
            with writing(path), path.open("r+b") as file:
                file.truncate(len(whole))
        return {record["number"]: record for _, record in found}

    def add(self, task: str, record: Mapping[str, Any]) -> None:
        """One problem's record: a line, with the kernel before the next one begins."""
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", errors="surrogatepass") + b"\n"
        with writing(self._samples(task)), self._samples(task).open("ab", buffering=0) as file:
            while line:
                line = line[file.write(line) :]

    def close(self) -> None:
        """Give the folder free."""
        self._lock.release()

    def _samples(self, task: str) -> Path:
        return self.path / f"{task}.samples.jsonl"


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield line, record


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({error}); remove the folder and evaluate again") from None


def _compare(path: Path, stored: Any, asked: Any, key: str = "") -> None:
    """Raises UserError with the first difference."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in [*asked, *(name for name in stored if name not in asked)]:
            _compare(path, stored.get(name), asked.get(name), f"{key}.{name}" if key else name)
    elif stored != asked:
        raise UserError(
            f"{path} holds an evaluation with another {key} ({stored!r:.60}, now {asked!r:.60}); give another --out"
        )
