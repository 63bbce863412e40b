"""How far a work is, drawn: a live line on a terminal that is gone at the end, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text
from typing_extensions import Self

PLAIN_EVERY_S = 10.0
BAR_WIDTH = 20


class LiveLine:
    """A bar with what is said beside and below it. terminal_every_s: not drawn more often than that."""

    def __init__(self, stream: TextIO, terminal_every_s: float = 0.0) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._every_s = terminal_every_s if self._console.is_terminal else PLAIN_EVERY_S
        self._shown_at = float("-inf")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    @property
    def is_terminal(self) -> bool:
        """Whether anything stands below the bar."""
        return self._console.is_terminal

    def note(self, line: str) -> None:
        """Print a line above the live one."""
        self._console.print(Text(line))

    def show(self, done: int, total: int, beside: str, below: str, plain: str) -> None:
        """`plain` is what a file gets instead of the bar; the last one always gets through."""
        now = time.monotonic()
        if now - self._shown_at < self._every_s and done < total:
            return
        self._shown_at = now
        if not self.is_terminal:
            self.note(plain)
            return
        full = BAR_WIDTH * done // total
        bar = [("━" * full, "green"), ("─" * (BAR_WIDTH - full), "dim")]
        self._live.update(Text.assemble(*bar, f"  {beside}\n{below}", no_wrap=True), refresh=True)
