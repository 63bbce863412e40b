"""What a job has saved: the newest whole checkpoint of its run folder, by the manifest and not by the job's word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fireflyer.checkpoint.run import MANIFEST, checkpoint_step, damage, list_checkpoints

HASHED_UP_TO_BYTES = 1 << 30
"""Larger checkpoints are held against their manifest's sizes only: nodes wait for this, and the job hashes anyway."""


@dataclass(frozen=True)
class Saved:
    """`step` and `at` (wall time) of the newest whole checkpoint, None where there is none; what ails newer ones."""

    step: int | None
    at: float | None
    damage: str | None


def newest_saved(run_dir: Path) -> Saved:
    """Look at a run folder's checkpoints, newest first, until one is whole."""
    ailing: list[str] = []
    try:
        for path in list_checkpoints(run_dir):
            reason = damage(path, hash_up_to_bytes=HASHED_UP_TO_BYTES)
            if reason is None:
                at = (path / MANIFEST).stat().st_mtime
                return Saved(checkpoint_step(path), at, "; ".join(ailing) or None)
            ailing.append(f"{path.name}: {reason}")
    except OSError as error:
        ailing.append(f"{run_dir.name}: {error.strerror}")
    return Saved(None, None, "; ".join(ailing) or None)
