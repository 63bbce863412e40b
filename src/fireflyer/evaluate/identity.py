"""Which checkpoint, data and software a score is of: what a result has to keep to be believed later."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fireflyer import __version__

_WHOLE_UP_TO = 64 << 20
_PIECES, _PIECE_BYTES = 64, 1 << 16
METHOD = "sha256 over names, sizes and bytes; of each file above 64 MiB, 64 evenly spaced pieces of 64 KiB"


def checkpoint_identity(path: Path) -> dict[str, Any]:
    """Of a checkpoint's configuration, weights and tokenizer: a second for 700 GB, since most of it isn't read.

    path: a folder (not a run's), or a GGUF file. Another training step, quantisation or template gives another hash; a
    few weights changed by hand in a file above 64 MiB may not.
    """
    kinds = (".json", ".safetensors", ".jinja", ".gguf")
    # A manifest says when it was written, not what.
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix in kinds]
    files = [file for file in files if file.name not in ("manifest.json", "trainer.json")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        _add(digest, file)
    return {"path": str(path), "sha256": digest.hexdigest(), "method": METHOD}


def data_identity(path: Path) -> str:
    """sha256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        if path.is_dir():
            digest.update(f"{file.relative_to(path)}\n".encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def software(packages: Sequence[str]) -> dict[str, str]:
    """Versions of what the score was made with."""
    found = {"fireflyer": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _add(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _WHOLE_UP_TO:
            while block := opened.read(1 << 20):
                digest.update(block)
            return
        for piece in range(_PIECES):
            opened.seek((size - _PIECE_BYTES) * piece // (_PIECES - 1))
            digest.update(opened.read(_PIECE_BYTES))
