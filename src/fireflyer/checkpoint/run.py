"""A run's checkpoints: written so that no moment of a crash costs more than the steps since the last one.

In: a step and a function that writes the checkpoint's files into a folder. Out: `checkpoints/step-00000060/` with a
`manifest.json` of sizes and sha256; or, reading, the newest checkpoint whose manifest holds.

A checkpoint is written to a hidden folder beside its place, every file and folder is synced, and one rename puts it
there: what bears a checkpoint's name is whole. Deleting starts with a rename too. Still the reader trusts nothing but
the manifest, since disks lie and people copy folders by halves.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from fireflyer.errors import UserError

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_NAME = re.compile(r"step-(\d{8,})")
_SAVING = ".saving-"
_DELETED = ".deleted-"
_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint (None: there is none), and a line on each newer one that had to be passed over."""

    path: Path | None
    damaged: tuple[str, ...]


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of this step lies; eight digits or more, so that names sort as numbers."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} isn't named like a run's checkpoint (step-00000060)")
    return int(match[1])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, newest first, good or not."""
    root = run_dir / CHECKPOINTS
    if not root.is_dir():
        return []
    named = [path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(named, key=checkpoint_step, reverse=True)


def find_checkpoint(run_dir: Path) -> Found:
    """The newest checkpoint of a run whose files all have the size and hash that its manifest states."""
    damaged = []
    for path in list_checkpoints(run_dir):
        reason = damage(path)
        if reason is None:
            return Found(path, tuple(damaged))
        damaged.append(f"{path}: {reason}")
    return Found(None, tuple(damaged))


def newest_good_checkpoint(run_dir: Path) -> Path | None:
    """`find_checkpoint` for those who only want to read it."""
    return find_checkpoint(run_dir).path


def damage(path: Path, *, hash_up_to_bytes: int | None = None) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None when it is whole.

    hash_up_to_bytes: a checkpoint of more is held against its manifest's sizes only.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != MANIFEST_FORMAT or manifest["step"] != checkpoint_step(path) or not files:
            return f"{MANIFEST} is of another checkpoint or format"
        hashed = hash_up_to_bytes is None or sum(stated["bytes"] for stated in files.values()) <= hash_up_to_bytes
        for name, stated in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != stated["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {stated['bytes']}"
            if hashed and _sha256(file) != stated["sha256"]:
                return f"{name} has another sha256 than when it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} can't be used ({type(error).__name__}: {error})"
    return None


def write_checkpoint(run_dir: Path, step: int, write: Callable[[Path], None], *, recipe_sha256: str = "") -> Path:
    """Write one checkpoint atomically and return its folder.

    Args:
        write: puts every file of the checkpoint into the (empty) folder it is given.
        recipe_sha256: noted in the manifest.

    Raises:
        UserError: the disk is full, read-only or broken; older checkpoints are as they were.
    """
    final = checkpoint_path(run_dir, step)
    part = final.with_name(_SAVING + final.name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)
        part.mkdir()
        write(part)
        files = {}
        for file in sorted(part.rglob("*")):
            if file.is_file():
                files[file.relative_to(part).as_posix()] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            sync(file)
        manifest = {"format": MANIFEST_FORMAT, "step": step, "recipe_sha256": recipe_sha256, "files": files}
        write_text(part / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        sync(part)
        if final.exists():
            set_aside(final)
        part.rename(final)
        sync(final.parent)
        sync(run_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(_save_failed(final, error)) from error
    return final


def keep_newest(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; call it only once the newest is known to be good."""
    try:
        for path in list_checkpoints(run_dir)[keep:]:
            set_aside(path)
        remove_leftovers(run_dir)
    except OSError as error:
        raise UserError(f"old checkpoints in {run_dir / CHECKPOINTS} can't be deleted: {error}") from error


def discard_newer(run_dir: Path, step: int) -> None:
    """Delete the checkpoints after `step`: damaged ones that a resumed run passed over and is about to write again."""
    for path in list_checkpoints(run_dir):
        if checkpoint_step(path) > step:
            set_aside(path)
    remove_leftovers(run_dir)


def set_aside(path: Path) -> None:
    """Take a checkpoint's name from it in one rename, so that a half-deleted folder is never taken for a whole one."""
    aside = path.with_name(_DELETED + path.name)
    _remove(aside)
    path.rename(aside)
    sync(path.parent)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed saves and deletions left. Only the process that holds the run's lock may call this."""
    root = run_dir / CHECKPOINTS
    if root.is_dir():
        for path in root.iterdir():
            if path.name.startswith((_SAVING, _DELETED)):
                _remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it, synced, renamed."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk take a file's data or a folder's entries (folders can't be opened on Windows, nor need it)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_failed(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    older = next((other for other in list_checkpoints(path.parent.parent) if other != path and not damage(other)), None)
    stands = f"{older.name} is untouched" if older else "no earlier checkpoint exists"
    return (
        f"checkpoint {path} can't be saved: {reason}; {stands}: free the disk, then the same command goes on from there"
    )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
