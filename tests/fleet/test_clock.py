"""Clocks that jump, within a boot and across boots, and controllers that die in between."""

from __future__ import annotations

from fireflyer.fleet.clock import FleetClock


class Machine:
    """A wall clock that anybody may set, and a boot clock that nobody can."""

    def __init__(self) -> None:
        self.wall, self.boot, self.boot_id = 1_000_000.0, 50.0, "first"

    def clock(self, noted: str | None = None) -> FleetClock:
        return FleetClock(noted, lambda: self.wall, lambda: self.boot, self.boot_id)

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.boot += seconds


def test_begins_as_wall_time_and_ignores_jumps():
    machine = Machine()
    clock = machine.clock()
    assert clock.now() == 1_000_000
    for jump in (86_400.0, -200_000.0):
        machine.wall += jump
        before = clock.now()
        machine.pass_time(3)
        assert clock.now() == before + 3


def test_next_controller_goes_on_from_the_note():
    """Time in which no controller ran has passed all the same; a jump in that time has not."""
    machine = Machine()
    noted = machine.clock().note()
    machine.pass_time(100)
    machine.wall -= 999_999
    assert machine.clock(noted).now() == 1_000_100


def test_after_a_boot_only_forwards():
    machine = Machine()
    noted = machine.clock().note()
    machine.boot, machine.boot_id = 1.0, "second"
    machine.wall -= 5_000
    assert machine.clock(noted).now() == 1_000_000
    machine.wall += 5_060
    assert machine.clock(noted).now() == 1_000_060
