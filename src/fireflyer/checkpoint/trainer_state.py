"""What resuming needs beside the weights: optimizer moments, averaged weights, RNG, counters and the data cursor.

Tensors go to `trainer.safetensors` as they are (no dtype is narrowed: resume is bit-equal), the rest to `trainer.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS = "trainer.safetensors"
STATE = "trainer.json"
EMA_PREFIX = "ema."


def write_trainer_state(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write both files; the tensors must be contiguous and share no memory."""
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_trainer_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Both files of a verified checkpoint."""
    return load_file(folder / TENSORS), json.loads((folder / STATE).read_text(encoding="utf-8"))


def read_ema(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a run's checkpoint under their published names; empty where the run kept none."""
    if not (folder / TENSORS).is_file():
        return {}
    with safe_open(folder / TENSORS, "pt") as file:
        return {name[len(EMA_PREFIX) :]: file.get_tensor(name) for name in file.keys() if name.startswith(EMA_PREFIX)}  # noqa: SIM118
