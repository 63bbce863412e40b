"""A whole run in under a second: a tiny model with every part of the recipe in it, and text for it to read."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fireflyer.train.recipe import load_recipe
from fireflyer.train.settings import Recipe

MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 2,
}

SETTINGS = {
    "steps": 8,
    "batch_size": 4,
    "seq_len": 24,
    "checkpoint_every": 3,
    "eval_every": 0,
    "eval_rows": 6,
    "threads": 1,
    "data.fim_rate": 0.2,
    "schedule.warmup_steps": 2,
    **{f"model.{key}": value for key, value in MODEL.items()},
}

_WORDS = "alpha beta gamma delta the of and a house river stone light (x + y) := 12 naïve 火".split()


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
    """A .jsonl of short random documents of unequal length."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choice(_WORDS) for _ in range(draw.randrange(1, 30))) for _ in range(documents)]
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines), encoding="utf-8")
    return path


def tiny_recipe(*data: Path | str, init_from: str | None = None, **settings: Any) -> Recipe:
    """`settings` with `__` for the dots: `ema__decay=0.9`."""
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    merged = {**SETTINGS, **changed}
    if init_from is not None:
        merged = {key: value for key, value in merged.items() if not key.startswith("model.") or key in changed}
    overrides = [f"{key}={_toml(value)}" for key, value in merged.items()]
    return load_recipe(None, overrides, sources=[str(path) for path in data], init_from=init_from)


def checkpoint_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a checkpoint that must not depend on interruptions (wall times and hashes of them left out)."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("trainer.json", "manifest.json")
    }


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
