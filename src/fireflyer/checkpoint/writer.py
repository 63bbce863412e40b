"""Checkpoints written behind training: one thread, one save in flight, its error raised where training can see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fireflyer.checkpoint.run import keep_newest, write_checkpoint


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is on disk; `seconds` from its snapshot to its last sync."""

    step: int
    path: Path
    seconds: float


class CheckpointWriter:
    """Writes one run's checkpoints; `write` functions must hold copies, since training goes on under them."""

    def __init__(self, run_dir: Path, *, keep: int, recipe_sha256: str = "") -> None:
        self.run_dir = run_dir
        self.keep = keep
        self.recipe_sha256 = recipe_sha256
        self._thread: threading.Thread | None = None
        self._saved: list[SavedCheckpoint] = []
        self._error: BaseException | None = None

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Begin a save; waits for the one before. Raises that one's error."""
        self.wait()
        self._thread = threading.Thread(target=self._work, args=(step, write), name=f"save-{step}")
        self._thread.start()

    def finished(self) -> list[SavedCheckpoint]:
        """The saves that ended since the last call; raises the error of one that failed. Never waits."""
        if self._thread is not None and self._thread.is_alive():
            return []
        self.wait()
        saved, self._saved = self._saved, []
        return saved

    def wait(self) -> None:
        """Wait for the save in flight; raises its error."""
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the save in flight without raising: what is left to do while another error is on its way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, step: int, write: Callable[[Path], None]) -> None:
        begun = time.perf_counter()
        try:
            path = write_checkpoint(self.run_dir, step, write, recipe_sha256=self.recipe_sha256)
            keep_newest(self.run_dir, self.keep)
            self._saved.append(SavedCheckpoint(step, path, time.perf_counter() - begun))
        except BaseException as error:
            self._error = error
