"""Run Python that nobody has read, apart from this process and within limits; many pieces at once, cheaply.

In: programs, or answers for a grader. Out: an `Outcome` each; whatever a job does (loops, crashes, eats memory, exits),
it costs that job alone. One server process is started per `Sandbox` and forks for each job: about a millisecond each.

Every job runs in a session of its own with limits on wall-clock time, processor time, memory and the size of files and
output, without this process's environment, and is killed as a group when its time is over. Programs ("program") begin
in an empty folder that is removed after; on Linux the kernel also forbids them network, processes, signals to others,
and changes to files outside that folder (`confine.py`; `confinement` says what holds here).

What this is not: a program can still read every file that this user can read; where `confinement` is empty (macOS, old
kernels) it can also write and connect; a hole in the kernel opens everything. It is made for the code that a model
writes by itself. For code that somebody writes against you, run all of Fireflyer in a virtual machine.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast

import fireflyer
from fireflyer.errors import UserError

_SOURCE = str(Path(fireflyer.__file__).parents[1])
# -c puts the current folder first, where anything may lie: our own takes its place, and goes too.
_START = (
    "import sys; sys.path[0] = {source!r}; "
    "from fireflyer.evaluate.sandbox_server import main; del sys.path[0]; "
    "given = sys.argv[1:]; sys.argv[:] = ['program.py']; main(*given)"
)
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
_START_S, _GRACE_S = 60.0, 10.0


@dataclass(frozen=True)
class Limits:
    """Of one job. seconds: on the clock; memory_mib: on top of what the server holds; output_bytes: of each stream, and
    of each file that it writes."""

    seconds: float = 10.0
    memory_mib: int = 1024
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    status: "done" (it reached its end), "exited" (it left before, with `code`), "raised", "overran" (its time),
        "crashed".
    value: what a grader gave. note: one line that says why it isn't done; "" where it is.
    """

    status: Literal["done", "exited", "raised", "overran", "crashed"]
    value: Any = None
    code: int = 0
    note: str = ""
    stdout: str = ""
    stderr: str = ""


class Sandbox:
    """Jobs for one target, at most `workers` of them at once (default: one a core). Use as a context manager.

    target: "program": jobs are (code, stdin), and the value None. "math": (expected, answer), judged by math-verify:
        the value is [equal, what was read]. A path: (problem as JSON, answer) for the `grade` of that Python file,
        which is the user's own: it may use network and files, from the folder where it lies; the value is a float.

    Raises UserError for a file that can't be loaded and for a missing package, when entered.
    """

    def __init__(
        self, target: Literal["program", "math"] | Path, limits: Limits | None = None, workers: int | None = None
    ) -> None:
        if sys.platform == "win32":
            raise UserError("code can't be run apart on Windows, which has no fork; use Linux, macOS or WSL")
        self._target, self._limits = target, limits or Limits()
        self._workers = workers or os.cpu_count() or 1
        self._server: subprocess.Popen[bytes] | None = None
        self._folder: str | None = None
        self._unread = b""
        self._lock = threading.Lock()

    def __enter__(self) -> Sandbox:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server, and with it every job."""
        server, self._server = self._server, None
        if server is not None:
            _end(server)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # what a server that was killed has left
            self._folder = None

    def run(self, jobs: Sequence[Sequence[str]]) -> list[Outcome]:
        """The outcomes, in the order of the jobs. Never raises for what a job does. Safe from several threads."""
        found: dict[int, Outcome] = {}
        with self._lock:
            # A server that died (memory of the machine, say) took what it ran along: those get one more chance.
            for _ in range(2):
                missing = [number for number in range(len(jobs)) if number not in found]
                if missing:
                    self._run(jobs, missing, found)
        lost = Outcome("crashed", note="the process that grades ended; the machine may be short of memory")
        return [found.get(number, lost) for number in range(len(jobs))]

    def _run(self, jobs: Sequence[Sequence[str]], numbers: list[int], found: dict[int, Outcome]) -> None:
        server = self._open()
        lines = b"".join(json.dumps({"number": n, "job": list(jobs[n])}).encode() + b"\n" for n in numbers)
        # The server writes while it is written to: from one thread both could wait for each other.
        writer = threading.Thread(target=_write, args=(server, lines), daemon=True)
        writer.start()
        for _ in numbers:
            line = self._line(server, self._limits.seconds + _GRACE_S)
            if line is None:
                server.kill()
                self.close()
                break
            message = json.loads(line)
            found[message.pop("number")] = _outcome(message, self._limits)
        writer.join()

    def _open(self) -> subprocess.Popen[bytes]:
        if self._server is not None and self._server.poll() is None:
            return self._server
        self.close()
        self._unread = b""
        target = self._target if isinstance(self._target, str) else str(self._checked_file(self._target))
        self._folder = tempfile.mkdtemp(prefix="fireflyer-sandbox-")
        settings = json.dumps(asdict(self._limits) | {"workers": self._workers})
        self._server = server = subprocess.Popen(
            [sys.executable, "-s", "-c", _START.format(source=_SOURCE), settings, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            env=_environment(),
            start_new_session=True,
        )
        line = self._line(server, _START_S)
        if line is None:
            server.kill()
            self.close()
            raise UserError(f"{self._target} did not load within {_START_S:.0f} s, or ended Python while it loaded")
        ready = json.loads(line)
        if not ready["ready"]:
            self.close()
            if self._target == "math" and ready["missing"]:
                raise UserError("judging mathematics needs math-verify: pip install 'fireflyer[reason]'")
            raise UserError(f"{self._target} can't be used as a grader: {ready['detail']}")
        return server

    @staticmethod
    def _checked_file(path: Path) -> Path:
        if not path.is_file():
            raise UserError(f"{path}: no such file; a grader is a Python file with a function grade(problem, answer)")
        return path.resolve()

    def _line(self, server: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line of the server; None where it ends or stays silent."""
        assert server.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([server.stdout], [], [], left)[0]:
                return None
            got = os.read(server.stdout.fileno(), 1 << 16)
            if not got:
                return None
            self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def confinement() -> list[str]:
    """What the kernel adds for programs here: of "landlock" (no changes to files) and "seccomp" (no network)."""
    code = (
        f"import sys; sys.path[0] = {_SOURCE!r}; from fireflyer.evaluate.confine import confine; "
        "import tempfile; print(*confine(tempfile.gettempdir()))"
    )
    done = subprocess.run([sys.executable, "-s", "-c", code], env=_environment(), capture_output=True, text=True)
    return done.stdout.split()


def _end(server: subprocess.Popen[bytes]) -> None:
    assert server.stdin is not None
    assert server.stdout is not None
    with suppress(OSError):  # it has gone already
        server.stdin.close()
    try:
        server.wait(timeout=5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    server.stdout.close()


def _write(server: subprocess.Popen[bytes], lines: bytes) -> None:
    assert server.stdin is not None
    try:
        server.stdin.write(lines)
        server.stdin.flush()
    except (OSError, ValueError):
        return  # it has ended, which the reader sees


def _environment() -> dict[str, str]:
    """No secrets; hashes always the same, so that a program's outcome does not depend on when it runs."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return kept | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def _outcome(message: dict[str, Any], limits: Limits) -> Outcome:
    outcome = Outcome(
        cast(Any, message["status"]),
        message.get("value"),
        message.get("code", 0),
        message.get("detail", ""),
        message["stdout"],
        message["stderr"],
    )
    if outcome.status == "overran":
        return replace(outcome, note=f"ran longer than {limits.seconds:g} s")
    if outcome.status == "exited":
        return replace(outcome, note=f"left Python before its end, with exit code {outcome.code}")
    return outcome
