"""Jobs, slices, stops and deaths on plain processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from fireflyer.fleet import controller
from fireflyer.fleet.backend import Alive
from fireflyer.fleet.processes import with_variable
from fireflyer.fleet.records import ATTEMPT_VARIABLE, asked_path, read_json, use_path, write_json
from fireflyer.fleet.shepherd import main as shepherd

from .conftest import PYTHON, Lab

STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"


def remains(lab: Lab, number: int) -> list[int]:
    return with_variable(ATTEMPT_VARIABLE, str(lab.attempt_folder(number)), os.geteuid())


def test_three_users_share_one_node_and_lose_no_step(make_lab: Callable[..., Lab]):
    """Equal jobs of equal users: turn about, one at a time, each step done once, all kept (pain 1)."""
    lab = make_lab()
    tasks = {user: lab.counter(user, 60, user) for user in ("alice", "bob", "carol")}
    lab.until(lab.ended(*tasks.values()), 60)
    spans = []
    for user, number in tasks.items():
        assert lab.task(number).state == "done"
        begins, ends = lab.log(user)[::2], lab.log(user)[1::2]
        assert len(begins) >= 3
        assert [int(b[2]) for b in begins] == [0, *(int(e[2]) for e in ends[:-1])]  # went on where it stopped
        assert int(ends[-1][2]) == 60
        attempts = lab.attempts(number)
        assert [a.outcome for a in attempts] == ["saved"] * (len(attempts) - 1) + ["done"]
        assert sum(a.lost_s for a in attempts) == 0
        for attempt in attempts[:-1]:
            assert attempt.stop_at is not None
            assert attempt.stop_at - attempt.opened_at >= lab.settings.min_slice_s  # never below the minimum slice
        spans += [(a.opened_at, a.ended_at, user) for a in attempts]
    spans.sort()
    for (_, ended, _), (begun, _, _) in pairwise(spans):
        assert ended is not None
        assert begun >= ended  # one at a time on one node
    firsts = [user for _, _, user in spans[:3]]
    assert sorted(firsts) == ["alice", "bob", "carol"]  # nobody had a second slice before each had a first


def test_alone_nobody_is_interrupted(make_lab: Callable[..., Lab]):
    lab = make_lab(min_slice_s=0.05)
    number = lab.counter("alone", 40)
    lab.until(lab.ended(number))
    assert len(lab.attempts(number)) == 1


def test_deaf_job_is_killed_at_its_deadline(make_lab: Callable[..., Lab]):
    """KILL to all of it, children in sessions of their own included (pains 3, 15); the node is given on."""
    lab = make_lab()
    child = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)\n"
    deaf = lab.submit([*PYTHON, child + STUBBORN], deadline_s=0.6)
    lab.until(lab.running(deaf))
    other = lab.counter("other", 3, "bob")
    lab.until(lab.ended(other))
    first = lab.attempts(deaf)[0]
    assert first.outcome == "unsaved"
    assert "0.6 s after TERM, killed; nothing saved" in first.reason
    assert first.stop_s is not None
    assert 0.6 <= first.stop_s < 2
    assert first.lost_s > 0
    assert first.kept_s == 0
    assert not with_variable(ATTEMPT_VARIABLE, str(lab.fleet.hands.attempt_folder(first.id)), os.geteuid())
    assert lab.task(deaf).state in ("waiting", "running")  # it gets its next slice all the same


def test_what_a_job_leaves_behind_is_cleared(make_lab: Callable[..., Lab]):
    """A child in a session of its own, deaf: the node is given on without it (pain 3)."""
    lab = make_lab()
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True)"
    number = lab.submit([*PYTHON, code])
    lab.until(lab.ended(number))
    assert lab.task(number).state == "done"
    assert not remains(lab, number)


def test_term_reaches_every_process_once(make_lab: Callable[..., Lab], tmp_path: Path):
    """Not only the shell (pain 3): the command's child hears it as well, and neither hears it twice."""
    lab = make_lab()
    code = """
import os, signal, sys, time
heard = open(sys.argv[1], "a", buffering=1)
signal.signal(signal.SIGTERM, lambda *_: heard.write(f"{os.getpid()}\\n"))
os.fork()
time.sleep(0.4); time.sleep(0.4); time.sleep(0.4)
sys.exit(75)
"""
    heard = tmp_path / "heard"
    number = lab.submit(["sh", "-c", 'trap : TERM; "$@"', "sh", *PYTHON, code, str(heard)])
    lab.until(lab.running(number))
    time.sleep(0.2)
    lab.ledger.ask_task_to_stop(number, "stopped by alice", lab.fleet.clock.now())
    lab.until(lab.ended(number))
    pids = heard.read_text().split()
    assert len(pids) == len(set(pids)) == 2
    assert lab.task(number).state == "stopped"


def test_failure_is_shown_and_not_repeated(make_lab: Callable[..., Lab]):
    lab = make_lab()
    number = lab.submit([*PYTHON, "import sys; print('no such thing'); sys.exit(3)"])
    lab.until(lab.ended(number))
    assert (lab.task(number).state, lab.task(number).exit_code) == ("failed", 3)
    assert lab.task(number).reason == "exit code 3"
    assert (lab.attempt_folder(number) / "output.log").read_text() == "no such thing\n"
    assert len(lab.attempts(number)) == 1


def test_failure_is_repeated_where_asked(make_lab: Callable[..., Lab]):
    lab = make_lab()
    number = lab.submit([*PYTHON, "import os; os.abort()"], restarts=2)
    lab.until(lab.ended(number))
    assert lab.task(number).reason == "ended by signal SIGABRT"
    assert len(lab.attempts(number)) == 3


def test_75_unasked_goes_on_but_not_for_ever(make_lab: Callable[..., Lab]):
    lab = make_lab()
    number = lab.submit([*PYTHON, "import sys; sys.exit(75)"])
    lab.until(lab.ended(number))
    assert lab.task(number).state == "failed"
    assert "75 unasked, 3 times in a row" in lab.task(number).reason


@pytest.mark.parametrize("what", ["command", "folder"])
def test_what_does_not_exist_says_so(what: str, make_lab: Callable[..., Lab]):
    lab = make_lab()
    if what == "command":
        number = lab.submit(["no-such-command"])
    else:
        number = lab.submit(["true"], cwd=str(lab.folder.root / "no-such-folder"))
    lab.until(lab.ended(number))
    assert lab.task(number).state == "failed"
    assert "can't be started in" in lab.task(number).reason
    assert "No such file or directory" in lab.task(number).reason


def test_arguments_meet_no_shell(make_lab: Callable[..., Lab]):
    lab = make_lab()
    words = ["a b", "$(touch gone)", "`id`", "; touch gone", "'", '"', "\\", "*", "-x", "\n", "ü", ""]
    number = lab.submit([*PYTHON, "import sys; print(sys.argv[1:])", *words])
    lab.until(lab.ended(number))
    assert (lab.attempt_folder(number) / "output.log").read_text() == f"{words}\n"
    assert not (lab.folder.root / "gone").exists()


def test_a_gang_starts_whole_or_not_at_all(make_lab: Callable[..., Lab]):
    """Two gangs of two and one of one on three nodes: never a half of one (pain 4)."""
    lab = make_lab(nodes=3, min_slice_s=5.0)
    code = "import os, time; print(os.environ['PET_NODE_RANK'], os.environ['PET_NNODES'], flush=True); time.sleep(0.5)"
    gangs = [lab.submit([*PYTHON, code], f"user{i}", nodes=2) for i in range(3)]
    lab.until(lab.ended(*gangs))
    for number in gangs:
        assert lab.task(number).state == "done"
        (attempt,) = lab.attempts(number)
        assert len(set(attempt.nodes)) == 2
        folder = lab.attempt_folder(number)
        assert (folder / "output.log").read_text() == "0 2\n"
        assert (folder / "output-1.log").read_text() == "1 2\n"


def test_a_rank_that_fails_takes_the_gang_along(make_lab: Callable[..., Lab]):
    """The others would wait for it for ever (pain 9); the code shown is its own."""
    lab = make_lab(nodes=2)
    code = "import os, sys, time\nif os.environ['PET_NODE_RANK'] == '1': sys.exit(4)\ntime.sleep(600)"
    number = lab.submit([*PYTHON, code], nodes=2)
    lab.until(lab.ended(number))
    assert lab.task(number).state == "failed"
    assert lab.task(number).reason == "rank 1 on n2: exit code 4"
    assert not remains(lab, number)


def test_a_rank_that_dies_with_its_node_is_replaced_alone(make_lab: Callable[..., Lab]):
    """The gang comes back on the node that lived and one other; what was saved is kept (pain 7)."""
    lab = make_lab(nodes=3)
    number = lab.counter("gang", 100, nodes=2)
    lab.until(lab.running(number))
    assert lab.attempts(number)[0].nodes == ["n1", "n2"]
    launch = lab.fleet.hands.launch_of(lab.task(number), lab.attempts(number)[0])
    lab.fleet.validation.drain("n2", "its power is gone")
    os.killpg(json.loads(launch.backend_id or "")[1][0], signal.SIGKILL)
    lab.until(lambda: len(lab.attempts(number)) == 2 and lab.running(number)())
    first, second = lab.attempts(number)
    assert first.outcome == "lost"
    assert "n2" in first.reason
    assert sorted(second.nodes) == ["n1", "n3"]


def test_lost_contact_is_not_death(make_lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch):
    """The back end says that the job is gone, its shepherd still writes: it is not started a second time (pain 6)."""
    lab = make_lab()
    number = lab.counter("job", 100)
    lab.until(lab.running(number))
    real = lab.backend.alive
    monkeypatch.setattr(controller, "FORGOTTEN_S", 0.5)
    monkeypatch.setattr(
        lab.backend, "alive", lambda launches: {n: Alive(frozenset(), certain=False) for n in real(launches)}
    )
    for beat in range(10):
        write_json(use_path(lab.attempt_folder(number), 0), {"beat": beat})
        until = time.monotonic() + 0.15
        while time.monotonic() < until:
            lab.fleet.tick()
    monkeypatch.setattr(lab.backend, "alive", real)
    lab.until(lab.ended(number))
    assert [attempt.outcome for attempt in lab.attempts(number)] == ["done"]


def test_late_shepherd_of_a_voided_launch_goes_home(make_lab: Callable[..., Lab], tmp_path: Path):
    """The claim decides: given up or begun, never both."""
    lab = make_lab()
    number = lab.submit(["touch", str(tmp_path / "ran")])
    task = lab.task(number)
    attempt = lab.ledger.attempt(lab.ledger.open_attempt(number, ["n1"], True, 0.0))
    assert attempt is not None
    launch = lab.fleet.hands.launch_of(task, attempt)
    lab.fleet.hands._lay_out(task, launch)
    lab.fleet.hands.find_or_void(task, attempt, 0.0)
    assert shepherd([str(launch.folder), "0"]) == 0
    assert not (tmp_path / "ran").exists()
    lab.until(lab.ended(number))
    assert (tmp_path / "ran").exists()  # by the next attempt
    assert len(lab.attempts(number)) == 1


def test_stop_is_told_once_even_by_two_controllers(make_lab: Callable[..., Lab]):
    """A controller killed after its TERM: the next one sees that it has arrived, and sends no second."""
    lab = make_lab()
    code = """
import signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
while not asked: time.sleep(0.01)
time.sleep(0.8)
sys.exit(75 if len(asked) == 1 else 9)
"""
    number = lab.submit([*PYTHON, code])
    lab.until(lab.running(number))
    time.sleep(0.1)
    lab.ledger.ask_task_to_stop(number, "stopped", lab.fleet.clock.now())
    lab.until(lambda: read_json(asked_path(lab.attempt_folder(number), 0)))
    lab.controller()
    lab.until(lab.ended(number))
    assert lab.attempts(number)[0].outcome == "saved"
