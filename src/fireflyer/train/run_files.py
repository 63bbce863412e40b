"""What a run writes while it goes on: its logs, and its checkpoints behind it. One process of a run has these open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run_folder import EXPERTS, SAMPLES, MetricsLog
from fireflyer.checkpoint.writer import CheckpointWriter, SavedCheckpoint
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import recipe_sha256
from fireflyer.train.snapshot import Snapshot


class RunFiles:
    """The logs, cut back to the step that the run goes on from, and the writer of checkpoints. Raises UserError."""

    def __init__(self, run_dir: Path, recipe: Recipe, resume_step: int) -> None:
        self.metrics = MetricsLog(run_dir, resume_step=resume_step)
        self.experts = MetricsLog(run_dir, resume_step=resume_step, name=EXPERTS)
        self.samples = MetricsLog(run_dir, resume_step=resume_step, name=SAMPLES)
        self._logs = (self.metrics, self.experts, self.samples)
        self._writer = CheckpointWriter(run_dir, keep=recipe.keep_checkpoints, recipe_sha256=recipe_sha256(recipe))

    def log(self, row: dict[str, Any], samples: list[dict[str, Any]], experts: dict[str, Any] | None) -> None:
        """A step's lines, those of `samples` before the others."""
        for sample in samples:
            self.samples.append({"step": row["step"], **sample})
        self.metrics.append(row)
        if experts is not None:
            self.experts.append({"step": row["step"], **experts})

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Begin a checkpoint, its history on disk before it; raises the error of the one before."""
        for log in self._logs:
            log.sync()
        self._writer.save(step, snapshot.write)

    def saved(self, *, wait: bool = False) -> list[SavedCheckpoint]:
        """The checkpoints that are on disk since the last call; raises the error of one that isn't."""
        if wait:
            self._writer.wait()
        return self._writer.finished()

    def close(self) -> None:
        """Wait for a save in flight and close the logs; raises nothing."""
        self._writer.join()
        for log in self._logs:
            log.close()
