"""An attempt's folder: what controller, shepherd and job tell one another, in small files that one of them writes once.

    spec.json        the controller: what to run, where, for whom
    claim-R          who came first for rank R: its shepherd, or the controller that gave the launch up ("void")
    started-R.json   the shepherd: the command runs
    asked-R.json     the shepherd: TERM has arrived
    use-R.json       the shepherd, every few seconds: processor time and the GPUs' load
    saved.json       the job, through `fleet.job()`: the step it saved last
    verdict.json     the validator, where the job is one
    ended-R.json     the shepherd: how the command ended and what it had saved
    output.log       the command's output; that of rank R > 0 in output-R.log

The folder belongs to the job's user. Whoever reads follows no link, waits for no pipe and believes no type.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SPEC = "spec.json"
SAVED = "saved.json"
VOID = "void"
VERDICT = "verdict.json"
ATTEMPT_VARIABLE = "FIREFLYER_FLEET_ATTEMPT"
"""The attempt's folder, in the environment of each of its processes."""

_RECORD_BYTES = 4096
_READ_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class Spec:
    """What the shepherds of one attempt are to run, one shepherd a node."""

    task: int
    attempt: int
    argv: list[str]
    cwd: str
    env: dict[str, str]
    umask: int
    nodes: list[str]
    node_env: list[dict[str, str]]
    run_dir: str | None
    deadline_s: float
    master_port: int


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    """Exit code, or minus the signal's number."""
    ran_s: float
    stop_s: float | None
    """From TERM to the end; None where no TERM came."""
    killed: bool
    """The deadline passed and the shepherd killed it."""
    saved_step: int | None
    """The newest whole checkpoint's step, or what the job said through `fleet.job()`."""
    since_save_s: float | None
    """The end's distance from the last save of this attempt; None: it saved nothing."""
    damage: str | None
    """What is wrong with a newer checkpoint than the newest whole one."""
    error: str | None
    """Why the command could not be started."""
    cpu_s: float


def started_path(folder: Path, rank: int) -> Path:
    return folder / f"started-{rank}.json"


def asked_path(folder: Path, rank: int) -> Path:
    return folder / f"asked-{rank}.json"


def use_path(folder: Path, rank: int) -> Path:
    return folder / f"use-{rank}.json"


def ended_path(folder: Path, rank: int) -> Path:
    return folder / f"ended-{rank}.json"


def output_path(folder: Path, rank: int) -> Path:
    return folder / ("output.log" if rank == 0 else f"output-{rank}.log")


def claim(folder: Path, rank: int, who: str) -> bool:
    """Be the first for a rank; the file system decides, so that a launch is either given up or made, never both."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        descriptor = os.open(folder / f"claim-{rank}", flags, 0o600)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, who.encode())
    finally:
        os.close(descriptor)
    return True


def is_void(folder: Path) -> bool:
    """Whether the controller gave this launch up before its first rank began."""
    return _read_bytes(folder / "claim-0") == VOID.encode()


def write_spec(folder: Path, spec: Spec) -> None:
    write_json(folder / SPEC, asdict(spec))


def read_spec(folder: Path) -> Spec:
    return Spec(**json.loads((folder / SPEC).read_text(encoding="utf-8")))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all; owner only."""
    part = path.with_name(f".{path.name}.part")
    descriptor = os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        json.dump(value, file)
    part.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """A record that another user may have written: None where there is none that could be one."""
    content = _read_bytes(path)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def modified(path: Path) -> float | None:
    """When a record was written last."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return None


def read_ended(folder: Path, rank: int) -> Ended | None:
    """A rank's end; None while there is none. One that says nothing usable is an end without a known code."""
    path = ended_path(folder, rank)
    if not path.is_symlink() and not path.exists():
        return None
    value = read_json(path)
    kinds = {"code": int, "ran_s": (int, float), "killed": bool, "cpu_s": (int, float)}
    optional = {
        "stop_s": (int, float),
        "saved_step": int,
        "since_save_s": (int, float),
        "damage": str,
        "error": str,
    }
    if (
        value is None
        or value.keys() != {field.name for field in fields(Ended)}
        or not all(isinstance(value[name], kind) for name, kind in kinds.items())
        or not all(value[name] is None or isinstance(value[name], kind) for name, kind in optional.items())
    ):
        return Ended(1, 0.0, None, False, None, None, None, "its end record can't be read", 0.0)
    return Ended(**value)


class ReservedRecord:
    """The end record's space on the disk, taken before the command starts: a full disk can't swallow how it ended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
        self._descriptor = os.open(self._part, flags, 0o600)
        os.write(self._descriptor, b" " * _RECORD_BYTES)
        os.fsync(self._descriptor)

    def write(self, value: dict[str, Any]) -> None:
        """Durable once this returns."""
        text = json.dumps(value).encode()
        os.pwrite(self._descriptor, text.ljust(_RECORD_BYTES), 0)
        os.fsync(self._descriptor)
        self._part.replace(self._path)
        os.close(self._descriptor)


def _read_bytes(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_size > _READ_LIMIT_BYTES:
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError:
        return None
    finally:
        os.close(descriptor)
