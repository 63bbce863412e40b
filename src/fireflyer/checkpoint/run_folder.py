"""The rest of a run folder: the lock that keeps a second process out, and the logs that are cut back on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run import write_text
from fireflyer.errors import UserError

EXPERTS = "experts.jsonl"
LOCK = ".lock"
METRICS = "metrics.jsonl"
RECIPE = "recipe.toml"
SAMPLES = "samples.jsonl"
SUMMARY = "summary.json"
TOKENIZER = "tokenizer.json"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses within is the user's to mend: one line about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} can't be written: {error.strerror}; free the disk or give another folder, then start again"
        ) from error


class FileLock:
    """Held by one process at a time. The kernel drops it with the process, however that ends."""

    def __init__(self, path: Path, refusal: str) -> None:
        """`refusal`: what is said where another holds it, with {holder} for what that one has written down."""
        import fcntl  # absent on Windows, where everything but training and the fleet still works

        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise UserError(refusal.replace("{holder}", holder)) from error
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()}\n")
        self._file.flush()

    def release(self) -> None:
        """Give the folder free (closing drops the lock; the file stays, since removing it would race)."""
        self._file.close()

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class RunLock(FileLock):
    """Held while a process trains in the folder."""

    def __init__(self, run_dir: Path) -> None:
        with writing(run_dir):
            super().__init__(
                run_dir / LOCK,
                f"{run_dir} is in use by another process ({{holder}}): wait for it or stop it, or give another --run",
            )


def read_metrics(run_dir: Path, up_to_step: int | None = None, *, name: str = METRICS) -> list[dict[str, Any]]:
    """The whole lines of a log, oldest first, of steps up to `up_to_step`; a torn last line is left out."""
    path = run_dir / name
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is empty or torn
        try:
            row = json.loads(line)
            if up_to_step is not None and row["step"] > up_to_step:
                break
        except (ValueError, KeyError, TypeError):
            break
        rows.append(row)
    return rows


class MetricsLog:
    """Appends JSON objects, each with its step, to a log, beginning after the checkpoint that the run resumes from.

    name: METRICS, or that of another log of the folder.
    """

    def __init__(self, run_dir: Path, *, resume_step: int, name: str = METRICS) -> None:
        self.path = run_dir / name
        text = "".join(_line(row) for row in read_metrics(run_dir, up_to_step=resume_step, name=name))
        with writing(self.path):
            if not self.path.exists() or self.path.read_bytes() != text.encode():
                write_text(self.path, text)
            self._file = self.path.open("ab", buffering=0)  # a line is with the kernel before the next step begins

    def append(self, row: dict[str, Any]) -> None:
        """Write one line; NaN is refused, since it isn't JSON. Raises UserError when the disk is full."""
        line = _line(row).encode()
        with writing(self.path):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Have the disk take all lines so far; done before a checkpoint, so that its history is never missing."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the log can't be used after."""
        self._file.close()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
