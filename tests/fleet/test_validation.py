"""Nodes examined: a good one stays, one that computes wrong is drained with the reason, and nothing runs there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fireflyer.fleet import validator
from fireflyer.fleet.local import SOURCE, LocalBackend, LocalNode
from fireflyer.fleet.validator import SIZE_VARIABLE, Fault, check_disk, check_matmul, check_memory

from .conftest import Lab

# Runs at the start of every Python on the node: one element of a product is off by one, as from a bad multiplier.
BAD_MULTIPLIER = """
import fireflyer.fleet.validator as v
real = v._products
def products(left, right):
    found = real(left, right)
    found[-1][1][7, 9] += 1
    return found
v._products = products
"""


def test_planted_bad_node_is_drained(make_lab: Callable[..., Lab], tmp_path: Path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "sitecustomize.py").write_text(BAD_MULTIPLIER)
    small = {SIZE_VARIABLE: "8"}
    bad = {**small, "PYTHONPATH": f"{tmp_path / 'bad'}:{SOURCE}"}
    lab = make_lab(backend=LocalBackend([LocalNode("n1", "a", small), LocalNode("n2", "a", bad)]))
    lab.fleet.tick()
    asked = lab.fleet.validation.ask("n2")
    assert lab.fleet.validation.ask("n2") == asked  # not twice
    lab.until(lab.ended(asked), 60)
    (drained,) = lab.ledger.drained().items()
    assert drained[0] == "n2"
    assert drained[1].startswith("validation failed: matmul: ")
    assert drained[1].endswith("1 of 262144 elements of a product are wrong")
    job = lab.submit(["true"])
    gang = lab.submit(["true"], nodes=2)
    lab.until(lab.ended(job))
    assert lab.attempts(job)[0].nodes == ["n1"]
    assert lab.task(gang).state == "waiting"
    shutil.rmtree(tmp_path / "bad")  # repaired
    again = lab.fleet.validation.ask("n2")
    lab.until(lab.ended(again, gang), 60)
    assert not lab.ledger.drained()


def test_memory_check_sees_a_flipped_bit():
    block = np.zeros(100, dtype=np.uint64)
    block[61] = 1 << 40
    with pytest.raises(Fault, match="pattern 0x00: 1 words of 100 differ, the first at byte 488"):
        validator._compare(block, np.uint64(0), "pattern 0x00")
    assert check_memory(1 << 20) == "1 MiB hold 5 patterns"


def test_matmul_check_is_exact():
    assert "exact on numpy" in check_matmul()


def test_disk_check_sees_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert check_disk(tmp_path, 1 << 20) == "1 MiB written, synced and read back"
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    with pytest.raises(Fault, match="came back from"):
        check_disk(tmp_path, 1 << 20)
    assert not list(tmp_path.iterdir())
