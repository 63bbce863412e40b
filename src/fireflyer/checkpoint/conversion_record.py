"""What a conversion knows of itself: `conversion.json` in its folder, and whether a folder may be converted into.

The record says from which files (sizes and times), to what and by which version; while the conversion runs, also the
file in hand and how many of its steps the disk has for certain. Finished, it holds nothing of when or how often the
conversion was stopped: the folder's bytes are those of a conversion that never was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.conversion_plan import PlannedFile
from fireflyer.checkpoint.published import CONVERSION
from fireflyer.checkpoint.run import write_text
from fireflyer.config.messages import shown
from fireflyer.errors import UserError

VERSION = 1
"""Of the bytes that a conversion writes and of the steps that it takes: raised with any change of either."""

_RESERVE = f".{CONVERSION}.part"
_RESERVE_BYTES = 1 << 16
_NEW = "give a new folder, or empty this one"


@dataclass
class Record:
    """The content of conversion.json. `file` is the one in hand, in `num_steps` steps, of which `steps` are on disk
    for certain, and `bytes` with them."""

    to: str
    max_shard_bytes: int
    source: dict[str, dict[str, int]]
    version: int = VERSION
    finished: bool = False
    file: str = ""
    num_steps: int = 0
    steps: int = 0
    bytes: int = 0

    def write(self, folder: Path) -> None:
        """Put it there, whole or not at all; until it says finished, keep room for its next version, since a full disk
        is what it has to tell of. Raises OSError."""
        write_text(folder / CONVERSION, json.dumps(asdict(self), indent=1) + "\n")
        if not self.finished:
            with suppress(OSError):
                (folder / _RESERVE).write_bytes(bytes(_RESERVE_BYTES))  # where write_text writes first

    def can_go_on(self, folder: Path, file: PlannedFile) -> bool:
        """Whether the unfinished file is there, begun with this size and these steps."""
        part = folder / part_name(file)
        begun = self.file == file.name and self.num_steps == len(file.steps)
        return begun and part.is_file() and part.stat().st_size == file.num_bytes


def fingerprint(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Size and time of each file by name: enough to see that one was exchanged."""
    found = {}
    for path in sorted(set(files)):
        stat = path.stat()
        found[path.name] = {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
    return found


def find_record(folder: Path, source: Path, wanted: Record) -> Record:
    """The record to go on from, `wanted` itself where nothing is there yet. Only looks. Raises UserError."""
    try:
        if folder.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{folder}: lies within {source}, which is only read; give a folder elsewhere")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: a file is there; give a new folder")
        entries = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: can't be used ({error.strerror}); give a folder that can be written to") from None
    if not [name for name in entries if name != _RESERVE]:
        return wanted
    if CONVERSION not in entries:
        raise UserError(f"{folder}: not empty, and no {CONVERSION} of an earlier start is in it; {_NEW}")
    found = _read(folder / CONVERSION)
    _check_same(folder, found, wanted)
    return found


def _read(path: Path) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = Record(**content)
        for name, kind in (
            ("to", str),
            ("version", int),
            ("file", str),
            ("steps", int),
            ("bytes", int),
            ("source", dict),
        ):
            if not isinstance(content.get(name), kind):
                raise TypeError(name)
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: can't be read as a conversion's state; {_NEW}") from None
    return record


def _check_same(folder: Path, found: Record, wanted: Record) -> None:
    begun = f"{folder}: a conversion to {shown(found.to)} {'is' if found.finished else 'was begun'} there"
    if found.to != wanted.to:
        raise UserError(f"{begun}, not to {wanted.to}; {_NEW}")
    if found.source != wanted.source:
        raise UserError(f"{begun}, but of another source: {_difference(found.source, wanted.source)}; {_NEW}")
    if found.max_shard_bytes != wanted.max_shard_bytes:
        raise UserError(f"{begun}, in files of {shown(found.max_shard_bytes)} bytes, not {wanted.max_shard_bytes}")
    if found.version != wanted.version and not found.finished:
        raise UserError(
            f"{begun} by a fireflyer that converts otherwise (version {found.version} of conversions, here"
            f" {wanted.version}); go on with that one, or {_NEW}"
        )


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    if gone := sorted(then.keys() - now.keys()):
        return f"{shown(gone[0])} was read, and isn't there now"
    if new := sorted(now.keys() - then.keys()):
        return f"{new[0]} is there now, and wasn't read then"
    name = next(name for name in now if then[name] != now[name])
    sizes = [side[name].get("bytes") if isinstance(side[name], dict) else None for side in (then, now)]
    if sizes[0] != sizes[1]:
        return f"{name} has {sizes[1]} bytes, and had {shown(sizes[0])}"
    return f"{name} was written anew since"


def part_name(file: PlannedFile) -> str:
    """What a file is called until it is whole."""
    return f"{file.name}.part"


def is_whole(folder: Path, file: PlannedFile) -> bool:
    """Whether the file is there, as long as planned and with the planned header."""
    path = folder / file.name
    if not path.is_file() or path.stat().st_size != file.num_bytes:
        return False
    with path.open("rb") as opened:
        return opened.read(len(file.header)) == file.header


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out; the kernel drops the lock with the process. Leaves nothing in the folder."""
    if os.name == "nt":  # no such lock there
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder}: another process converts into it; wait for it, or give another folder") from None
    try:
        yield
    finally:
        os.close(descriptor)
