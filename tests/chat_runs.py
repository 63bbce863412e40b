"""A tiny model to begin post-training from, and chats for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_run import tiny_recipe, write_text

from fireflyer.train.loop import train
from fireflyer.train.recipe import load_recipe
from fireflyer.train.settings import Recipe

SETTINGS = {"steps": 6, "batch_size": 4, "seq_len": 48, "checkpoint_every": 3, "eval_every": 0, "threads": 1}


def base_model(folder: Path) -> Path:
    """A run of three steps."""
    train(tiny_recipe(write_text(folder / "text.jsonl", 60), steps=3, seq_len=64), folder / "base")
    return folder / "base"


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def post_training(preset: str, base: Path, data: Path, **settings: Any) -> Recipe:
    """`settings` with `__` for the dots."""
    merged = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    overrides = [f"{key}={json.dumps(value)}" for key, value in merged.items()]
    return load_recipe(None, overrides, sources=[str(data)], init_from=str(base), base=preset)
