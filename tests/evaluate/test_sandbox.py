"""Code apart: whatever it does costs that job alone, within its limits, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from fireflyer.errors import UserError
from fireflyer.evaluate.sandbox import Limits, Sandbox, confinement

LIMITS = Limits(seconds=1.0, memory_mib=128, output_bytes=50_000)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox("program", LIMITS, workers=2) as opened:
        yield opened


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        ("while True: pass", "overran", "ran longer than 1 s"),
        ("import time; time.sleep(60)", "overran", "ran longer than 1 s"),
        ("hoard = []\nwhile True: hoard.append(bytearray(10**6))", "raised", "MemoryError"),
        ("x = [0] * 10**10", "raised", "MemoryError"),
        ("print('x' * 10**7)", "raised", "printed or wrote more than is allowed"),
        ("while True: print('lines' * 100)", "raised", "printed or wrote more than is allowed"),
        ("import sys; sys.exit(3)", "exited", "exit code 3"),
        ("import sys; sys.exit(0)", "exited", "exit code 0"),
        ("import os; os._exit(0)", "exited", "exit code 0"),
        ("import ctypes; ctypes.string_at(0)", "crashed", "SIGSEGV"),
        ("def f(): f()\nf()", "raised", "RecursionError"),
        ("raise KeyboardInterrupt", "raised", "KeyboardInterrupt"),
        ("this is no python", "raised", "SyntaxError"),
        ("class E(Exception):\n def __str__(self): raise self\nraise E", "raised", "E"),
    ],
)
def test_what_a_job_does_is_an_outcome(sandbox, code, status, note):
    began = time.monotonic()
    hostile, honest = sandbox.run([(code, ""), ("print(input())", "here")])
    assert (hostile.status, honest.status, honest.stdout) == (status, "done", "here\n")
    assert note in hostile.note
    assert len(hostile.stdout) <= LIMITS.output_bytes
    assert time.monotonic() - began < 10


def test_a_fork_bomb_leaves_no_process():
    with Sandbox("program", Limits(seconds=1.0625, memory_mib=128), workers=1) as unlike_others:
        (outcome,) = unlike_others.run([("import os\nwhile True:\n    os.fork()", "")])
        assert outcome.status in ("raised", "overran")
        # A fork keeps its parent's command line: the server alone may still have it.
        assert sum("1.0625" in line for line in map(_command_line, Path("/proc").glob("[0-9]*"))) == 1


def _command_line(process: Path) -> str:
    try:
        return (process / "cmdline").read_text()
    except OSError:
        return ""


@pytest.mark.skipif("seccomp" not in confinement(), reason="this kernel has no seccomp")
def test_no_network_no_processes_no_signals(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        codes = [
            f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            "import subprocess; subprocess.run(['true'])",
            "import os; os.kill(os.getppid(), 9)",
        ]
        outcomes = sandbox.run([(code, "") for code in codes])
    assert all("PermissionError" in outcome.note for outcome in outcomes)
    (threads,) = sandbox.run([("import threading\nt = threading.Thread(target=print)\nt.start(); t.join()", "")])
    assert threads.status == "done"


@pytest.mark.skipif("landlock" not in confinement(), reason="this kernel has no Landlock")
def test_files_outside_its_folder_stay_as_they_are(sandbox, tmp_path):
    victim = tmp_path / "thesis.txt"
    victim.write_text("years of work")
    changes = [
        "open(p, 'w')",
        "open(p, 'r+')",
        "os.remove(p)",
        "os.truncate(p, 0)",
        "os.rename(p, p + 'x')",
        "open(p + 'y', 'w')",
    ]
    outcomes = sandbox.run([(f"import os; p = {str(victim)!r}; {change}", "") for change in changes])
    assert all(outcome.status == "raised" for outcome in outcomes)
    assert victim.read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis.txt"]
    (own,) = sandbox.run([("open('own', 'w').write('x'); import os; print(os.listdir('.'))", "")])
    assert own.stdout == "['own']\n"


def test_secrets_of_the_environment_stay_out_and_nothing_is_left(monkeypatch):
    monkeypatch.setenv("FIREFLYER_API_KEY", "sesame")
    with Sandbox("program", LIMITS, workers=2) as fresh:
        folder = fresh._folder
        outcomes = fresh.run([("import os; print(os.environ); open('x', 'w').write('y')", "")] * 3)
    assert all("sesame" not in outcome.stdout for outcome in outcomes)
    assert not os.path.exists(folder)


def test_many_jobs_cost_little_and_keep_their_order(sandbox):
    began = time.monotonic()
    outcomes = sandbox.run([("print(input())", str(number)) for number in range(64)])
    assert [outcome.stdout for outcome in outcomes] == [f"{number}\n" for number in range(64)]
    assert time.monotonic() - began < 64 * 0.1  # 64 interpreters would take several times as long


def test_outcomes_do_not_depend_on_chance(sandbox):
    code = "import random; print(random.random(), list({'a', 'b', 'c', 'd', 'e', 'f'}))"
    with Sandbox("program", LIMITS, workers=1) as another:
        outcomes = sandbox.run([(code, "")] * 2) + another.run([(code, "")] * 2)
    assert len({outcome.stdout for outcome in outcomes}) == 1


def test_a_server_that_dies_is_replaced(sandbox):
    assert sandbox.run([("print(1)", "")])[0].status == "done"
    sandbox._server.kill()
    sandbox._server.wait()
    assert sandbox.run([("print(1)", "")])[0].stdout == "1\n"


def test_a_killed_server_takes_its_jobs_and_files_along():
    with Sandbox("program", Limits(seconds=30.0625), workers=1) as doomed:
        folder = Path(doomed._folder)
        running = threading.Thread(target=doomed.run, args=([("import time; time.sleep(30)", "")],))
        running.start()
        while not any(folder.iterdir()):
            time.sleep(0.01)
        for _ in range(2):  # its successor gets the job once more
            time.sleep(0.5)
            doomed._server.kill()
        running.join(timeout=20)
        assert not running.is_alive()
        deadline = time.monotonic() + 5
        while any("30.0625" in line for line in map(_command_line, Path("/proc").glob("[0-9]*"))):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert not folder.exists()


def test_jobs_that_a_dying_server_took_along_are_run_again(tmp_path):
    """Once: one that ends every server is lost alone, and the run goes on."""
    path = tmp_path / "mine.py"
    path.write_text(
        "import os, signal\n"
        "def grade(problem, answer):\n"
        "    if answer == 'always' or (answer == 'once' and not os.path.exists('been')):\n"
        "        open('been', 'w').close()\n"
        "        os.kill(os.getppid(), signal.SIGKILL)\n"
        "    return 1\n"
    )
    with Sandbox(path, LIMITS, workers=1) as grader:
        outcomes = grader.run([("{}", "first"), ("{}", "once"), ("{}", "last")])
        assert [outcome.status for outcome in outcomes] == ["done"] * 3
        (lost,) = grader.run([("{}", "always")])
        assert (lost.status, "process that grades ended" in lost.note) == ("crashed", True)
        assert grader.run([("{}", "after")])[0].value == 1.0


def test_mathematics_apart():
    with Sandbox("math", Limits(seconds=2, memory_mib=2048), workers=1) as judge:
        same, other, nothing, hostile = judge.run(
            [
                (r"$\frac{1}{2}$", r"so it is $\boxed{0.5}$"),
                ("$3$", r"\boxed{4}"),
                ("$3$", "I do not know"),
                ("$3$", r"$9^{9^{9^{9^{9}}}}$"),
            ]
        )
    assert same.value[0] is True
    assert other.value[0] is False
    assert nothing.value == [False, []]
    assert hostile.status != "done" or hostile.value[0] is False


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no such file"),
        ("grade = 3", "no function grade"),
        ("def grade(:", "SyntaxError"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
    ],
)
def test_a_grader_that_can_not_work_is_refused_before(tmp_path, text, reason):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=reason), Sandbox(path, LIMITS):
        pass
