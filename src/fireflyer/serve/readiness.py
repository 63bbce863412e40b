"""Whether requests are worth sending: /ready. In: the engine's count of steps. Out: None, or why not.

/health says that the process answers; that alone is true of a server whose engine hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

_LOOK_EVERY_S = 0.25


class Readiness:
    """Watches that steps end while there is work. `look` gives (steps done, whether there is work)."""

    def __init__(self, look: Callable[[], tuple[int, bool]], step_timeout_s: float) -> None:
        self._look = look
        self._step_timeout_s = step_timeout_s
        self._steps = 0
        self._well_at = time.monotonic()
        self.warm = False
        self.failure: str | None = None

    def trouble(self) -> str | None:
        """Why this server is not ready, or None."""
        if self.failure is not None:
            return self.failure
        if not self.warm:
            return "warming up"
        self._observe()
        stuck_s = time.monotonic() - self._well_at
        return f"no step has ended for {stuck_s:.0f} s" if stuck_s > self._step_timeout_s else None

    async def watch(self) -> None:
        """Look often, until cancelled: or work that came a moment ago would look stuck since the last look."""
        while True:
            self._observe()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _observe(self) -> None:
        steps, busy = self._look()
        if steps != self._steps or not busy:
            self._steps, self._well_at = steps, time.monotonic()
