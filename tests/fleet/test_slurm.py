"""The same on a real Slurm: three nodes in two zones, started for these tests."""

from __future__ import annotations

import os
import pwd
import signal
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks._slurm import SlurmCluster
from fireflyer.fleet.backend import Unreachable
from fireflyer.fleet.folder import StateFolder
from fireflyer.fleet.slurm import SlurmBackend

from .conftest import PYTHON, Lab
from .test_crashes import check_never_twice
from .test_local import STUBBORN

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def lab(slurm: SlurmCluster, make_lab: Callable[..., Lab]) -> Iterator[Lab]:
    lab = make_lab(backend=SlurmBackend("test" + os.urandom(3).hex(), None), min_slice_s=0.7)
    lab.until(lambda: all(node.health == "up" for node in lab.fleet.sight.nodes))
    yield lab
    for number in (task.id for task in lab.ledger.active_tasks()):
        lab.ledger.ask_task_to_stop(number, "the test is over", lab.fleet.clock.now())
    lab.until(lambda: not lab.ledger.open_attempts())


def only_node(lab: Lab, name: str) -> None:
    """Leave one node in service."""
    for node in lab.backend.nodes():
        if node.name != name:
            lab.fleet.validation.drain(node.name, "not in this test")


@pytest.fixture(autouse=True)
def undrained(slurm: SlurmCluster) -> Iterator[None]:
    yield
    for name, state in slurm.states().items():
        if "drain" in state:
            slurm.run("scontrol", "update", f"NodeName={name}", "State=RESUME")


def test_nodes_have_zones_and_health(lab: Lab, slurm: SlurmCluster):
    assert [(n.name, n.zone, n.health) for n in lab.backend.nodes()] == [
        ("n1", "zone_a", "up"),
        ("n2", "zone_a", "up"),
        ("n3", "zone_b", "up"),
    ]
    lab.backend.set_drained("n2", True, "bad memory; rm -rf $HOME")
    node = lab.backend.nodes()[1]
    assert (node.health, node.reason) == ("drained", "fleet: bad memory; rm -rf $HOME")
    lab.backend.set_drained("n2", False, "")
    lab.until(lambda: lab.backend.nodes()[1].health == "up")


def test_gang_across_zones_and_deaf_gang(lab: Lab):
    """Every rank on its node, TERM on all of them, KILL at the deadline on all of them."""
    code = "import os\nprint(os.environ['SLURMD_NODENAME'], os.environ['PET_NODE_RANK'], flush=True)\n" + STUBBORN
    deaf = lab.submit([*PYTHON, code], nodes=3, deadline_s=0.5)
    lab.until(lab.running(deaf))
    other = lab.counter("other", 3, "bob")
    lab.until(lab.ended(other))
    first = lab.attempts(deaf)[0]
    folder = lab.fleet.hands.attempt_folder(first.id)
    assert first.outcome == "unsaved"
    assert (folder / "output.log").read_text() == "n1 0\n"
    assert {(folder / f"output-{rank}.log").read_text() for rank in (1, 2)} == {"n2 1\n", "n3 2\n"}


def test_environment_arguments_and_folder_are_the_submitters(lab: Lab, tmp_path: Path):
    words = ["$(touch gone)", "a b", "'", "\n", "#SBATCH -N9"]
    code = "import os, sys; print(os.getcwd(), os.environ['COLOUR'], 'SLURM_JOB_ID' in os.environ, sys.argv[1:])"
    env = {"COLOUR": "green; exit 1", "PATH": os.environ["PATH"]}
    number = lab.submit([*PYTHON, code, *words], env=env, cwd=str(tmp_path))
    lab.until(lab.ended(number))
    said = (lab.attempt_folder(number) / "output.log").read_text()
    assert said == f"{tmp_path} green; exit 1 True {words}\n"


def test_jobs_run_as_their_user(lab: Lab, open_folder: Path, everybodys_python: str):
    """A fleet of root's for all users: uid, groups and files are the user's own."""
    lab.folder = StateFolder(open_folder)
    lab.folder.prepare(shared=True)
    lab.fleet.hands.folder = lab.folder
    lab.fleet.hands.as_me = False
    nobody = pwd.getpwnam("nobody")
    code = "import os; print(os.getuid(), os.getgid(), oct(os.umask(0)))"
    number = lab.submit([everybodys_python, "-c", code], "nobody", uid=nobody.pw_uid, gid=nobody.pw_gid, cwd="/")
    lab.until(lab.ended(number))
    assert (lab.attempt_folder(number) / "output.log").read_text() == f"{nobody.pw_uid} {nobody.pw_gid} 0o22\n"
    assert lab.attempt_folder(number).stat().st_uid == nobody.pw_uid


def test_slurm_down_at_submit_and_in_the_middle(lab: Lab, slurm: SlurmCluster):
    """Kept and retried; what runs runs on, is neither cancelled nor started again (pain 6), and its end is seen."""
    only_node(lab, "n1")
    running = lab.counter("running", 100_000)
    lab.until(lab.running(running))
    slurm.stop_controller(signal.SIGTERM)
    try:
        waiting = lab.counter("waiting", 3, "bob")
        until = time.monotonic() + 3
        while time.monotonic() < until:
            lab.fleet.tick()
            time.sleep(0.05)
        assert lab.fleet.sight.trouble is not None
        assert "Slurm" in lab.fleet.sight.trouble
        assert lab.task(waiting).state == "waiting"
        assert len(lab.attempts(running)) == 1
        assert lab.attempts(running)[0].state == "running", lab.attempts(running)[0].reason
        with pytest.raises(Unreachable):
            lab.backend.nodes()
    finally:
        slurm.start_controller()
    lab.until(lab.ended(waiting), 60)
    assert lab.task(waiting).state == "done"
    first = lab.attempts(running)[0]
    assert (first.outcome, first.lost_s) == ("saved", 0.0)


def test_controller_dies_between_sbatch_and_ledger(lab: Lab):
    """The job is found by its name, and not submitted again."""
    real = lab.backend.launch
    launched = []

    def launch(given):
        launched.append(real(given))
        raise KeyboardInterrupt

    lab.backend.launch = launch  # type: ignore[method-assign]
    number = lab.counter("job", 30)
    with pytest.raises(KeyboardInterrupt):
        lab.until(lab.ended(number))
    lab.ledger.close()
    lab.backend.launch = real  # type: ignore[method-assign]
    lab.controller()
    lab.until(lab.ended(number))
    assert [attempt.backend_id for attempt in lab.ledger.attempts_of(number)] == launched
    check_never_twice(lab.log("job"), 30)


def test_node_dies_under_a_gang(lab: Lab, slurm: SlurmCluster):
    """Slurm says NODE_FAIL; the gang goes on with the node that lived and one other (pain 7)."""
    number = lab.submit([*PYTHON, "import time; time.sleep(600)"], nodes=2)
    lab.until(lab.running(number))
    assert lab.attempts(number)[0].nodes == ["n1", "n2"]
    slurm.kill_node("n2")
    try:
        lab.until(lambda: len(lab.attempts(number)) == 2 and lab.running(number)(), 60)
        first, second = lab.attempts(number)
        assert first.outcome == "lost"
        assert second.nodes == ["n1", "n3"]
        health = {node.name: node.health for node in lab.backend.nodes()}
        assert health["n2"] == "lost"
    finally:
        slurm.start_node("n2")
        lab.ledger.ask_task_to_stop(number, "enough", lab.fleet.clock.now())
        lab.until(lab.ended(number))
        lab.until(lambda: all(node.health == "up" for node in lab.backend.nodes()))


def test_nodes_of_others_are_left_alone(lab: Lab, slurm: SlurmCluster):
    job = slurm.run("sbatch", "--parsable", "-w", "n1", "-o", "/dev/null", "--wrap", "sleep 60").strip()
    try:
        lab.until(lambda: lab.backend.nodes()[0].health == "lost")
        assert lab.backend.nodes()[0].reason == f"taken by Slurm's job {job}"
        number = lab.counter("job", 5)
        lab.until(lab.ended(number))
        assert lab.attempts(number)[0].nodes != ["n1"]
    finally:
        slurm.run("scancel", "-s", signal.SIGKILL.name[3:], "--full", job)
        lab.until(lambda: lab.backend.nodes()[0].health == "up")


def test_a_change_of_slices_takes_seconds(lab: Lab):
    """From TERM to the next job's first line. The bound is the proof's to keep; a busy machine gets more here."""
    only_node(lab, "n1")
    tasks = [lab.counter(user, 40, user) for user in ("alice", "bob")]
    lab.until(lab.ended(*tasks), 60)
    attempts = sorted((a for n in tasks for a in lab.attempts(n)), key=lambda a: a.opened_at)
    changes = [
        later.started_at - earlier.stop_at
        for earlier, later in pairwise(attempts)
        if earlier.stop_at is not None and later.started_at is not None
    ]
    assert changes
    assert min(changes) < 5
