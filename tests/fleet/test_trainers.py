"""Real training runs that share a node, each against the same run alone; the long form is the proof `fleet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks._slurm import SlurmCluster
from benchmarks.fleet import alone, deaf_job, share_node

STEPS = 150


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, float]:
    """The outcome alone, and its seconds, start of torch included: what a slice must be measured against."""
    return alone(tmp_path_factory.mktemp("alone"), STEPS, 1)


def check(folder: Path, options: list[str], whole: tuple[Any, float]) -> None:
    expected, seconds = whole
    for share in (0.6, 0.4, 0.25):  # where the machine has become faster since, a run may end within its first slice
        part = folder / f"slices-of-{share}"
        part.mkdir()
        shared = share_node(part, options, STEPS, share * seconds, (1, 1, 1), {1: expected}, kills=3)
        assert not shared.bad
        assert shared.equal == 3
        assert shared.overlaps == 0
        if shared.slices > 3:
            break
    assert shared.slices > 3
    deaf = deaf_job(folder / "deaf", options)
    assert 1.0 <= deaf.stop_s < 3
    assert deaf.lost_s == pytest.approx(deaf.unsaved_s, abs=0.5)
    assert deaf.resumed_where_saved


def test_three_trainers_share_a_node_of_this_machine(tmp_path: Path, whole: tuple[Any, float]):
    check(tmp_path, ["--backend", "local"], whole)


def test_three_trainers_share_a_node_of_slurm(tmp_path: Path, whole: tuple[Any, float], slurm: SlurmCluster):
    for name in slurm.names[1:]:
        slurm.run("scontrol", "update", f"NodeName={name}", "State=DRAIN", "Reason=not in this test")
    try:
        check(tmp_path, ["--backend", "slurm"], whole)
    finally:
        for name in slurm.names[1:]:
            slurm.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
