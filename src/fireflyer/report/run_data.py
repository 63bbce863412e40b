"""What a report is made of. In: a run folder, finished or still training. Out: its files as plain values. No torch."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run_folder import EXPERTS, METRICS, RECIPE, SAMPLES, SUMMARY, read_metrics
from fireflyer.config import ModelConfig
from fireflyer.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class RunData:
    """One run. `experts` and `samples` are empty where the run kept none; `summary` where it isn't finished."""

    name: str
    folder: Path
    recipe: dict[str, Any]
    model: ModelConfig
    steps: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    summary: dict[str, Any]


def read_run(folder: str | Path) -> RunData:
    """Read what a run has written so far. Raises UserError where the folder holds no run, or none that has begun."""
    path = Path(folder)
    if not (path / RECIPE).is_file():
        what = f"no {RECIPE} in it" if path.is_dir() else "no such folder"
        raise UserError(f"{folder}: {what}; give the folder of a run, as runs/ember")
    steps = read_metrics(path)
    if not steps:
        raise UserError(
            f"{folder}: {METRICS} has no step yet; the run has to take its first one before there's a report"
        )
    recipe_path = path / RECIPE
    try:
        recipe = tomllib.loads(recipe_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{recipe_path}: can't be read ({error}); it is written by training, not by hand") from error
    return RunData(
        name=path.resolve().name,
        folder=path,
        recipe=recipe,
        model=ModelConfig.from_dict(recipe["model"], source=str(recipe_path)),
        steps=steps,
        experts=read_metrics(path, name=EXPERTS),
        samples=read_metrics(path, name=SAMPLES),
        summary=_summary(path / SUMMARY),
    )


def recipe_differences(first: RunData, second: RunData) -> list[tuple[str, Any, Any]]:
    """(dotted key, value of the first, of the second) wherever the recipes differ; None where one hasn't the key."""
    left, right = _leaves(first.recipe), _leaves(second.recipe)
    keys = left.keys() | right.keys()
    return [(key, left.get(key), right.get(key)) for key in sorted(keys) if left.get(key) != right.get(key)]


def _summary(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found
