"""A run folder written by hand, for reports to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import tiny_recipe

from fireflyer.train.recipe import to_toml


def made_run(
    folder: Path, steps: int = 40, *, hostile: str = "", extra: dict[str, Any] | None = None, **settings: Any
) -> Path:
    """`steps` steps with an evaluation and samples every tenth, and the experts of two layers every fifth."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(to_toml(tiny_recipe("builtin:stdlib", **settings)), encoding="utf-8")
    metrics, experts, samples = [], [], []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step,
            "tokens": step * 96,
            "loss": 5 / step,
            "mtp_loss": 6 / step,
            "balance_loss": 3.0,
            "lr": 1e-3,
            "grad_norm": 1.0 + step % 3,
            "tokens_per_s": 1000.0,
            "max_vio": 1 / step,
            "batch_size": 4,
            "epoch": 0,
            "train_s": step * 0.5,
            **(extra or {}),
        }
        if step % 10 == 0:
            row |= {"eval_loss": 5.5 / step, "bits_per_byte": 4 / step}
            samples.append({"step": step, "prompt": "Once " + hostile, "text": f"upon {step}" + hostile})
        if step % 5 == 0:
            load = {layer: [float(expert == step % 8) * 8 for expert in range(8)] for layer in ("1", "2")}
            experts.append({"step": step, "load": load, "bias": {layer: [0.001 * step] * 8 for layer in load}})
        metrics.append(row)
    for name, rows in (("metrics", metrics), ("experts", experts), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
