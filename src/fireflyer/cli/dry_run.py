"""What a recipe would do, without doing it: its schedule with token boundaries, its size and its cost. No torch.

In: a Recipe. Out: a JSON-able dictionary, and the same for people.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fireflyer.config import ModelConfig, load_config
from fireflyer.config.sizes import show_bytes
from fireflyer.cost import v3_run
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.train.memory import run_memory
from fireflyer.train.quantities import format_quantity
from fireflyer.train.recipe import as_tables
from fireflyer.train.schedule import schedule_table
from fireflyer.train.settings import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Everything known before the data is read. A length in epochs isn't: then steps, tokens and schedule are None."""
    counts = count_parameters(recipe.model)
    tokens = recipe.total_tokens
    return {
        "recipe": as_tables(recipe),
        "parameters": {"total": counts.total, "active": counts.active, "mtp": counts.mtp},
        "steps": recipe.total_steps,
        "tokens": tokens,
        "schedule": None if tokens is None else [asdict(row) for row in schedule_table(recipe)],
        "train": _cost(recipe, tokens),
        "memory_bytes": run_memory(recipe).total,
    }


def _cost(recipe: Recipe, tokens: int | None) -> dict[str, float | None]:
    """Work of the run, and the hours it would take at the speed of the report's run."""
    main, mtp = _flops_per_token(recipe.model, recipe.batch_ramp.mean_seq_len)
    hours = None
    if tokens is not None:
        of_v3 = sum(_flops_per_token(load_config("deepseek-v3"), v3_run.SEQ_LEN))
        hours = v3_run.pretraining_gpu_hours(tokens) * (main + mtp) / of_v3
    return {
        "gflop_per_token": main / 1e9,
        "mtp_gflop_per_token": mtp / 1e9,
        "flops": None if tokens is None else (main + mtp) * tokens,
        "device_hours": hours,
        "usd": None if hours is None else v3_run.usd(hours),
    }


def _flops_per_token(model: ModelConfig, seq_len: float) -> tuple[float, float]:
    return training_flops_per_token(model, seq_len), mtp_training_flops_per_token(model, seq_len)


def describe(facts: dict[str, Any]) -> str:
    """The plan for people."""
    recipe, counts, train = facts["recipe"], facts["parameters"], facts["train"]
    lines = [
        f"{counts['total']:,} parameters, {counts['active']:,} active per token; {counts['mtp']:,} more for MTP",
        f"{train['gflop_per_token']:.4g} GFLOP per training token, {train['mtp_gflop_per_token']:.4g} more for MTP",
        f"{show_bytes(facts['memory_bytes'])} of memory, about, on one process",
    ]
    if facts["schedule"] is None:
        length = f"{recipe['epochs']:g} epochs of the data"
        return "\n".join([*lines, f"{length}: steps and boundaries are known once its tokens are counted"])
    lines += [
        f"{_tokens(facts['tokens'])} tokens in {facts['steps']:,} steps of sequences of {_lengths(recipe)} tokens",
        f"{_amount(train['device_hours'])} H800 hours at the speed of DeepSeek-V3's own run,"
        f" ${_amount(train['usd'])} at ${v3_run.USD_PER_GPU_HOUR:g} an hour",
        "",
        *_table(facts["schedule"]),
    ]
    return "\n".join(lines)


def _lengths(recipe: dict[str, Any]) -> str:
    phases = recipe.get("extend", {}).get("phases", [recipe])
    return " and ".join(f"{phase['seq_len']:,}" for phase in phases)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ("tokens", "step", "lr", "batch", "tokens/step", "MTP λ", "bias γ")
    cells: list[tuple[str, ...]] = [head]
    for row in rows:
        sizes = (f"{row['batch_size']:,}", f"{row['tokens_per_step']:,}")
        weights = (f"{row['mtp_weight']:g}", f"{row['bias_speed']:g}")
        cells.append((_tokens(row["tokens"]), f"{row['step']:,}", f"{row['lr']:.3g}", *sizes, *weights))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    notes = ["", *(", ".join(row["events"]) for row in rows)]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return [f"{line}  {note}".rstrip() for line, note in zip(aligned, notes, strict=True)]


def _tokens(count: int) -> str:
    exact = format_quantity(count)
    return f"{count:,}" if exact.isdigit() or count < 10**9 else exact


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
