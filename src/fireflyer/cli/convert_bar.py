"""A conversion's progress, drawn."""

from __future__ import annotations

import time
from typing import TextIO

from fireflyer.checkpoint.convert import Progress
from fireflyer.cli.live import LiveLine
from fireflyer.cli.progress import duration
from fireflyer.config.sizes import show_bytes


class Bar(LiveLine):
    """Bytes, files, speed, time left, and the tensor that is being written."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream, terminal_every_s=0.1)
        self._begun: tuple[float, int] | None = None

    def on_progress(self, progress: Progress) -> None:
        """Draw it."""
        now = time.monotonic()
        if self._begun is None:
            self._begun = (now, progress.done_bytes)
        line = self._line(progress, now)
        self.show(progress.done_bytes, progress.total_bytes, line, progress.tensor, line)

    def _line(self, progress: Progress, now: float) -> str:
        assert self._begun is not None
        parts = [
            f"{show_bytes(progress.done_bytes)} of {show_bytes(progress.total_bytes)}",
            f"file {progress.file} of {progress.num_files}",
        ]
        took, written = now - self._begun[0], progress.done_bytes - self._begun[1]
        if took > 0 and written > 0:
            speed = written / took
            parts.append(f"{speed / 1e9:.2f} GB/s")
            parts.append(f"left {duration((progress.total_bytes - progress.done_bytes) / speed)}")
        return "  ".join(parts)
