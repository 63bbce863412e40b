"""Who may do what: jobs as their user, others' tasks and files out of reach, records that are traps."""

from __future__ import annotations

import os
import pwd
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fireflyer.errors import UserError
from fireflyer.fleet.channel import Peer
from fireflyer.fleet.records import claim, read_ended, read_json
from fireflyer.fleet.requests import Requests

from .conftest import Lab

ME, OTHER = Peer(os.geteuid(), os.getegid()), Peer(60_001, 60_001)


def request(lab: Lab, peer: Peer, what: str, **arguments: object) -> object:
    return Requests(lab.fleet, threading.Event()).answer(peer, what, arguments)


@pytest.mark.parametrize("what", ["stop", "status"])
def test_others_tasks_are_out_of_reach(what: str, make_lab: Callable[..., Lab]):
    lab = make_lab()
    number = lab.counter("mine", 5)
    with pytest.raises(UserError, match=f"task {number} is alice's, not uid60001's"):
        request(lab, OTHER, what, task=number)
    assert lab.task(number).state == "waiting"
    assert request(lab, ME, what, task=number)


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("down", {"suspend": False}),
        ("validate", {"node": None}),
        ("drain", {"node": "n1", "drained": True, "reason": "x"}),
    ],
)
def test_only_its_owner_tends_the_fleet(what: str, arguments: dict[str, object], make_lab: Callable[..., Lab]):
    lab = make_lab()
    lab.fleet.tick()
    with pytest.raises(UserError, match="whose fleet this is, may"):
        request(lab, OTHER, what, **arguments)


def submission(**changes: object) -> dict[str, object]:
    given = {"key": "k", "user": None, "name": "job", "argv": ["true"], "cwd": "/", "env": {}, "umask": 0, "nodes": 1}
    given |= {"run_dir": None, "deadline_s": None, "restarts": 0, "limit_s": None, "wait_for_nodes": False}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"argv": []}, "no command: give it after --"),
        ({"argv": ["a\0b"]}, "argv: text without NUL characters is wanted"),
        ({"name": "a; rm -rf"}, "--name 'a; rm -rf': a name has 1 to 64 letters"),
        ({"cwd": "here"}, "folder 'here' isn't absolute"),
        ({"deadline_s": 1e9}, "--deadline 1e+09: between 0 and 3600 s"),
        ({"restarts": -1}, "--restarts -1: 0 or more"),
        ({"limit_s": 0.0}, "--limit 0: above 0 s"),
        ({"env": {"A=B": "c"}}, "a variable's name is not empty and has no '='"),
        ({"nodes": 0}, "nodes = 0: a task needs 1 node at least"),
        ({"nodes": 9}, "nodes = 9: the fleet has 1; ask for 1 or fewer"),
        ({"user": "a b"}, "--for 'a b': a user's name has"),
    ],
)
def test_bad_submissions_are_one_line(changes: dict[str, object], line: str, make_lab: Callable[..., Lab]):
    lab = make_lab()
    lab.fleet.tick()
    with pytest.raises(UserError) as refused:
        request(lab, ME, "submit", **submission(**changes))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not lab.ledger.active_tasks()


def test_larger_than_the_fleet_is_kept_where_asked(make_lab: Callable[..., Lab]):
    """It waits for nodes, and says which size does not fit (pain 5)."""
    lab = make_lab()
    lab.fleet.tick()
    number = request(lab, ME, "submit", **submission(nodes=9, wait_for_nodes=True))["task"]  # type: ignore[index]
    lab.fleet.tick()
    (row,) = request(lab, ME, "queue")["tasks"]  # type: ignore[index]
    assert (row["task"], row["state"], row["why"]) == (number, "waiting", "asks for 9 nodes; 1 of 1 are up")


def test_records_that_are_traps_are_not_read(tmp_path: Path):
    """The folder is its user's: a link to somebody else's file, a pipe that nobody writes, numbers that are none."""
    secret = tmp_path / "secret.json"
    secret.write_text('{"a": 1}')
    (tmp_path / "ended-0.json").symlink_to(secret)
    os.mkfifo(tmp_path / "ended-1.json")
    (tmp_path / "ended-2.json").write_text('{"code": "0"}')
    assert read_json(tmp_path / "ended-0.json") is None
    for rank in range(3):
        ended = read_ended(tmp_path, rank)
        assert ended is not None
        assert (ended.code, ended.error) == (1, "its end record can't be read")
    assert read_ended(tmp_path, 3) is None
    (tmp_path / "claim-0").symlink_to(secret)
    assert not claim(tmp_path, 0, "void")
    assert secret.read_text() == '{"a": 1}'


def test_local_jobs_run_as_their_user(make_lab: Callable[..., Lab], open_folder: Path, everybodys_python: str):
    """And another user can neither read the attempt nor signal it."""
    from fireflyer.fleet.folder import StateFolder

    lab = make_lab()
    lab.folder = StateFolder(open_folder / "state")
    lab.folder.prepare(shared=True)
    lab.fleet.hands.folder, lab.fleet.hands.as_me = lab.folder, False
    nobody, daemon = pwd.getpwnam("nobody"), pwd.getpwnam("daemon")
    code = "import os, time; print(os.getuid(), os.getgid(), os.getgroups(), flush=True); time.sleep(600)"
    number = lab.submit(
        [everybodys_python, "-c", code], "nobody", uid=nobody.pw_uid, gid=nobody.pw_gid, cwd="/", deadline_s=0.3
    )
    lab.until(lab.running(number))
    output = lab.attempt_folder(number) / "output.log"
    lab.until(lambda: output.read_text().endswith("\n"))
    assert output.read_text() == f"{nobody.pw_uid} {nobody.pw_gid} [{nobody.pw_gid}]\n"
    pid = read_json(lab.attempt_folder(number) / "started-0.json")["pid"]  # type: ignore[index]
    for command in (["cat", str(output)], ["kill", "-9", str(pid)], ["ls", str(lab.folder.ledger.parent)]):
        done = subprocess.run(command, user=daemon.pw_uid, group=daemon.pw_gid, capture_output=True, check=False)
        assert done.returncode != 0
    lab.ledger.ask_task_to_stop(number, "enough", lab.fleet.clock.now())
    lab.until(lab.ended(number))
