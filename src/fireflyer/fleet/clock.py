"""The fleet's clock: begins as wall time, then goes on at the pace of the machine's own clock, whoever sets the other.

A wall clock that jumps would end slices early, charge users for hours that never were, or stop the fleet until the past
has come again. Within one boot the time since the last note is measured by the boot's clock, controllers that died in
between included; across boots only the wall clock is left, and it is believed forwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path


def _boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class FleetClock:
    """`now()` never goes back; `note()` is what the next controller continues from."""

    def __init__(
        self,
        noted: str | None,
        wall: Callable[[], float] = time.time,
        boot_s: Callable[[], float] = _boot_s,
        boot_id: str | None = None,
    ) -> None:
        self._wall, self._boot_s = wall, boot_s
        self._boot_id = _boot_id() if boot_id is None else boot_id
        self._begun_s = boot_s()
        if noted is None:
            self._base_s = wall()
            return
        before = json.loads(noted)
        if before["boot_id"] == self._boot_id:
            self._base_s = before["now_s"] + max(0.0, self._begun_s - before["boot_s"])
        else:
            self._base_s = before["now_s"] + max(0.0, wall() - before["wall_s"])

    def now(self) -> float:
        return self._base_s + max(0.0, self._boot_s() - self._begun_s)

    def note(self) -> str:
        return json.dumps(
            {"now_s": self.now(), "boot_s": self._boot_s(), "boot_id": self._boot_id, "wall_s": self._wall()}
        )
