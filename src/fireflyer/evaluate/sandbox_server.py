"""The process behind `sandbox.Sandbox`: started once, it loads what grading needs and forks for each job.

A fork costs a millisecond where an interpreter costs thirty and sympy seven hundred. In: one JSON object a line on
stdin. Out: one a line on stdout. Standard library only, so that it starts fast and its children stay small.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import CodeType
from typing import Any, SupportsFloat, cast

from fireflyer.evaluate.confine import confine, end_with_parent

Job = list[str]
_SHOWN_CHARS = 300
_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """As `sandbox.Limits`; `workers`: jobs at once."""

    seconds: float
    memory_mib: int
    output_bytes: int
    workers: int


@dataclass
class _Child:
    number: int
    pid: int
    result: int
    folder: str
    deadline: float
    received: bytes = b""


class Server:
    """Forks a child for each job, `workers` at once, and ends those that overrun."""

    def __init__(
        self, settings: Settings, do: Callable[[Job], Any], root: str, *, confined: bool, receive: int, send: int
    ) -> None:
        self._settings, self._do, self._root, self._confined = settings, do, root, confined
        self._receive, self._send = receive, send
        self._waiting: deque[tuple[int, Job]] = deque()
        self._running: dict[int, _Child] = {}
        self._unread = b""

    def serve(self) -> None:
        """Until the other end closes the pipe."""
        try:
            while True:
                while self._waiting and len(self._running) < self._settings.workers:
                    self._start(*self._waiting.popleft())
                nearest = min((child.deadline for child in self._running.values()), default=None)
                wait = None if nearest is None else max(0.0, nearest - time.monotonic())
                for ready in select.select([self._receive, *self._running], [], [], wait)[0]:
                    if ready == self._receive:
                        if not self._read_jobs():
                            return
                    else:
                        self._read_result(self._running[ready])
                for child in list(self._running.values()):
                    if time.monotonic() >= child.deadline:
                        self._end(child, overrun=True)
        finally:
            for child in list(self._running.values()):
                self._kill(child)

    def _read_jobs(self) -> bool:
        got = os.read(self._receive, 1 << 16)
        *lines, self._unread = (self._unread + got).split(b"\n")
        for line in lines:
            request = json.loads(line)
            self._waiting.append((request["number"], request["job"]))
        return bool(got)

    def _start(self, number: int, job: Job) -> None:
        folder = tempfile.mkdtemp(dir=self._root)
        result, result_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(result)
            self._become(job, folder, result_end)
        os.close(result_end)
        self._running[result] = _Child(number, pid, result, folder, time.monotonic() + self._settings.seconds)

    def _become(self, job: Job, folder: str, result_end: int) -> None:
        """The child's life; it never returns."""
        code = 1
        try:
            os.setsid()
            end_with_parent()
            self._redirect(folder, result_end)
            self._limit()
            if self._confined:
                os.chdir(folder)
                confine(folder)
            random.seed(0)
            report: dict[str, Any]
            try:
                report = {"status": "done", "value": self._do(job)}
            except SystemExit as leaving:
                report = {"status": "exited", "code": _exit_code(leaving)}
            except BaseException as error:
                report = {"status": "raised", "detail": _described(error)}
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):  # over the limit of output, or closed by the program
                    report = {"status": "raised", "detail": "printed more than is allowed, or closed its output"}
            os.write(result_end, json.dumps(report).encode())
            code = 0
        finally:
            os._exit(code)

    def _redirect(self, folder: str, result_end: int) -> None:
        for name, stream in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            opened = os.open(f"{folder}.{name}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, stream)
            os.close(opened)
        for descriptor in (self._receive, self._send, *self._running):
            os.close(descriptor)
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
        sys.stdout, sys.stderr = (
            os.fdopen(stream, "w", encoding="utf-8", errors="backslashreplace", closefd=False) for stream in (1, 2)
        )

    def _limit(self) -> None:
        settings = self._settings
        seconds = int(settings.seconds) + 1
        held = _address_space() + settings.memory_mib * _MIB
        for limit, most in (
            (resource.RLIMIT_AS, held),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, settings.output_bytes),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(limit)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            try:
                resource.setrlimit(limit, (most, most))
            except (OSError, ValueError):  # macOS refuses RLIMIT_AS
                continue

    def _read_result(self, child: _Child) -> None:
        got = os.read(child.result, 1 << 16)
        child.received += got
        if not got or len(child.received) > self._settings.output_bytes:
            self._end(child, overrun=False)

    def _end(self, child: _Child, *, overrun: bool) -> None:
        """Kill what is left of the job, send its outcome, remove its files."""
        if not overrun:
            # It has closed its end, most likely by exiting: a status of its own tells more than our kill.
            _wait_for_exit(child.pid, min(max(0.0, child.deadline - time.monotonic()), 1.0))
        status = self._kill(child)
        try:
            outcome = json.loads(child.received)
        except ValueError:
            outcome = _unreported(status)
        if overrun:
            outcome = {"status": "overran"}
        for name in ("stdout", "stderr"):
            outcome[name] = _beginning(f"{child.folder}.{name}", self._settings.output_bytes)
        self._remove_files(child)
        _send(self._send, {"number": child.number, **outcome})

    def _kill(self, child: _Child) -> int:
        """End the child and its group, and reap it: before that nobody else can have its number. Returns its status."""
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError, PermissionError):
                kill(child.pid, signal.SIGKILL)
        os.close(child.result)
        del self._running[child.result]
        return os.waitpid(child.pid, 0)[1]

    def _remove_files(self, child: _Child) -> None:
        for name in ("stdin", "stdout", "stderr"):
            with suppress(OSError):
                os.remove(f"{child.folder}.{name}")
        shutil.rmtree(child.folder, ignore_errors=True)


def run_program(job: Job) -> None:
    """[code, stdin]: run the code as a program that reads this."""
    code, text = job
    os.write(0, text.encode(errors="surrogateescape"))
    os.lseek(0, 0, os.SEEK_SET)
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    exec(compile(code, "program.py", "exec"), module.__dict__)


def equal_by_math_verify(job: Job) -> list[Any]:
    """[expected, answer], each a text with mathematics: whether they agree, and how both were read."""
    from math_verify import parse, verify

    # The library's own deadlines are signals, which a native loop ignores; ours is the kernel's.
    expected, answer = (parse(text, parsing_timeout=cast(int, None)) for text in job)
    if not expected:
        raise ValueError(f"nothing to compare with in the expected answer {job[0]!r:.80}")
    return [bool(answer) and bool(verify(expected, answer, timeout_seconds=None)), [str(part) for part in answer[:1]]]


def load_grader(path: str) -> Callable[[Job], Any]:
    """A function of a file: `grade(problem, answer)`, called with a dictionary and a text."""
    with open(path, encoding="utf-8") as file:
        code: CodeType = compile(file.read(), path, "exec")
    os.chdir(os.path.dirname(path) or ".")
    sys.path.insert(0, os.path.dirname(path))
    module = type(sys)("grader")
    module.__file__ = path
    sys.modules["grader"] = module
    exec(code, module.__dict__)
    grade = module.__dict__.get("grade")
    if not callable(grade):
        raise LookupError("it has no function grade(problem, answer)")

    def do(job: Job) -> float:
        value = grade(json.loads(job[0]), job[1])
        if isinstance(value, SupportsFloat):  # a number of any library
            return float(value)
        raise TypeError(f"grade returned {value!r:.40}, not a number")

    return do


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None or isinstance(leaving.code, int):
        return leaving.code or 0
    return 1


def _described(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "MemoryError: more memory than is allowed"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return "printed or wrote more than is allowed"
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}"[:_SHOWN_CHARS].removesuffix(": ")


def _unreported(status: int) -> dict[str, Any]:
    """The outcome of a child that left without a word: os._exit, a signal, a crash of the interpreter."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return {"status": "overran"}
        return {"status": "crashed", "detail": f"ended by {signal.Signals(number).name}"}
    return {"status": "exited", "code": os.WEXITSTATUS(status)}


def _wait_for_exit(pid: int, seconds: float) -> None:
    """Until the process has exited; it stays to be reaped, so that its number is still its own."""
    if sys.platform != "linux":
        time.sleep(min(seconds, 0.01))
        return
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def _beginning(path: str, at_most: int) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(at_most).decode(errors="replace")
    except OSError:
        return ""


def _address_space() -> int:
    """Bytes mapped already: limits are on top of what the server has loaded. 0 where the system doesn't tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _send(descriptor: int, message: dict[str, Any]) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]


def main(settings_json: str, target: str) -> None:
    """target: what is to be done: "program", "math", or the path of a grader's file."""
    settings, root = Settings(**json.loads(settings_json)), os.getcwd()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who closes the pipe
    receive, send = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a grader's file prints while it loads
    try:
        do = _loaded(target)
    except BaseException as error:
        message = {"ready": False, "detail": _described(error), "missing": isinstance(error, ModuleNotFoundError)}
        with suppress(BrokenPipeError):
            _send(send, message)
        return
    try:
        _send(send, {"ready": True})
        Server(settings, do, root, confined=target == "program", receive=receive, send=send).serve()
    except BrokenPipeError:
        return  # the caller was killed
    finally:
        shutil.rmtree(root, ignore_errors=True)  # the caller does so too, unless it was killed


def _loaded(target: str) -> Callable[[Job], Any]:
    if target == "program":
        return run_program
    if target != "math":
        return load_grader(target)
    equal_by_math_verify([r"$\frac{1}{2}$", "0.5"])  # loads and compiles what every child would have to
    return equal_by_math_verify
