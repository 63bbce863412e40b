"""The report as one HTML file that asks nothing of any server. In: runs. Out: its text.

Style, script and the chart library stand in the file; numbers and words stand in it as JSON, which the script puts on
the page as text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from fireflyer import __version__
from fireflyer.config import load_config
from fireflyer.cost import v3_run
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.report.charts import charts, heat_maps
from fireflyer.report.run_data import RunData, recipe_differences

_FOLDER = Path(__file__).parent / "page"


def report_page(runs: Sequence[RunData], *, usd_per_hour: float | None = None) -> str:
    """One run, or two beside one another. usd_per_hour: what the machine costs, for the bill."""
    title = " and ".join(run.name for run in runs)
    data = {
        "runs": [_run(run, usd_per_hour) for run in runs],
        "charts": [asdict(chart) for chart in charts(runs)],
        "heat_maps": [asdict(heat_map) for heat_map in heat_maps(runs)],
        "differences": [[key, _shown(a), _shown(b)] for key, a, b in recipe_differences(*runs)]
        if len(runs) == 2
        else [],
        "version": __version__,
    }
    return (
        page_part("report.html")
        .replace("{{title}}", escape(title))
        .replace("{{style}}", page_part("vendor/uPlot.min.css") + page_part("report.css"))
        .replace("{{data}}", script_data(data))
        .replace("{{library}}", page_part("vendor/uPlot.iife.min.js"))
        .replace("{{script}}", page_part("report.js"))
    )


def page_part(name: str) -> str:
    """A file of `page/`, as text."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def script_data(data: dict[str, Any]) -> str:
    """JSON that no text within it, a sample of a model's say, can end as a script."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _run(run: RunData, usd_per_hour: float | None) -> dict[str, Any]:
    last = run.steps[-1]
    return {
        "name": run.name,
        "sentence": _sentence(run),
        "tiles": _tiles(run, usd_per_hour),
        "tables": {"Model": _model(run), "Recipe": _recipe(run)},
        "samples": run.samples,
        "step": last["step"],
        "finished": bool(run.summary),
    }


def _sentence(run: RunData) -> str:
    counts, last = count_parameters(run.model), run.steps[-1]
    state = "" if run.summary.get("step") == last["step"] else ", not finished yet"
    return (
        f"{_amount(counts.total + counts.mtp)} parameters, {_amount(counts.active)} of them at work for a token,"
        f" trained on {_amount(last['tokens'])} tokens in {_time(last['train_s'])} ({last['step']:,} steps{state})."
    )


def _tiles(run: RunData, usd_per_hour: float | None) -> list[list[str]]:
    """(figure, what it is, a word on it), the most telling first."""
    last = run.steps[-1]
    tiles: list[list[str]] = []
    if "accuracy" in run.summary and "held_out" in run.summary:
        tiles.append([f"{run.summary['accuracy']:.1%}", "held-out accuracy", f"{run.summary['held_out']:,} problems"])
    elif (examined := next((row for row in reversed(run.steps) if "eval_accuracy" in row), None)) is not None:
        tiles.append([f"{examined['eval_accuracy']:.1%}", "held-out accuracy", f"after step {examined['step']:,}"])
    evaluated = next((row for row in reversed(run.steps) if "bits_per_byte" in row), None)
    if evaluated is not None:
        tiles.append(
            [
                _figure(evaluated["bits_per_byte"]),
                "bits per byte, held out",
                f"loss {_figure(evaluated['eval_loss'])}",
            ]
        )
    recent = run.steps[-100:]
    tiles.append([_figure(_mean(recent, "loss")), "training loss", f"mean of the last {len(recent)} steps"])
    tiles.append([f"{_mean(recent, 'tokens_per_s'):,.0f}", "tokens a second", _time(last["train_s"]) + " in all"])
    flops = last["tokens"] * _flops_per_token(run)
    tiles.append([_amount(flops, "FLOPs"), "of training", "forward and backward, with MTP"])
    peak = last.get("peak_memory_bytes") or run.summary.get("peak_memory_bytes")
    if peak:
        tiles.append([f"{peak / 2**30:.2f} GiB", "peak memory", "of the process"])
    tiles.append(_bill(run, usd_per_hour))
    return tiles


def _bill(run: RunData, usd_per_hour: float | None) -> list[str]:
    """What the run cost at the machine's price; where none is known, at V3's own rate on H800s."""
    hours = run.steps[-1]["train_s"] / 3600
    if usd_per_hour is None and "usd" in run.summary:
        usd_per_hour = run.summary.get("usd_per_hour")
    if usd_per_hour is not None:
        return [f"${hours * usd_per_hour:.2g}", "cost", f"at ${usd_per_hour:g} an hour"]
    v3_flops = _v3_flops_per_token()
    gpu_hours = v3_run.pretraining_gpu_hours(run.steps[-1]["tokens"]) * _flops_per_token(run) / v3_flops
    return [
        f"${v3_run.usd(gpu_hours):.2g}",
        "at DeepSeek-V3's rate",
        f"{gpu_hours:.2g} H800 hours; this machine's: --usd-per-hour",
    ]


def _v3_flops_per_token() -> float:
    """Of V3's own run, MTP's share included."""
    config = load_config("deepseek-v3")
    return training_flops_per_token(config, v3_run.SEQ_LEN) + mtp_training_flops_per_token(config, v3_run.SEQ_LEN)


def _flops_per_token(run: RunData) -> float:
    seq_len = run.recipe["seq_len"]
    return training_flops_per_token(run.model, seq_len) + mtp_training_flops_per_token(run.model, seq_len)


def _model(run: RunData) -> list[list[str]]:
    model, counts = run.model, count_parameters(run.model)
    moe = sum(model.is_moe(layer) for layer in range(model.num_hidden_layers))
    rows = [
        ["parameters", f"{counts.total:,} ({counts.active:,} active), {counts.mtp:,} more for MTP"],
        ["vocabulary", f"{model.vocab_size:,}"],
        ["width, layers", f"{model.hidden_size:,}, {model.num_hidden_layers} ({moe} with experts)"],
        [
            "attention",
            f"{model.num_attention_heads} heads on a latent of {model.kv_lora_rank}; {model.latent_dim} cached",
        ],
    ]
    if moe:
        grouped = f" in {model.n_group} groups, {model.topk_group} of them open" if model.n_group > 1 else ""
        rows.append(
            [
                "experts",
                f"{model.num_experts_per_tok} of {model.n_routed_experts}{grouped}, {model.n_shared_experts} shared,"
                f" {model.moe_intermediate_size} wide",
            ]
        )
    return [*rows, ["MTP depths", str(model.num_nextn_predict_layers)]]


def _recipe(run: RunData) -> list[list[str]]:
    rows = []
    for key, value in run.recipe.items():
        if key == "model":
            continue
        pairs = (
            [(f"{key}.{name}", inner) for name, inner in value.items()] if isinstance(value, dict) else [(key, value)]
        )
        rows += [[name, _shown(inner)] for name, inner in pairs]
    return rows


def _shown(value: Any) -> str:
    return "not set" if value is None else value if isinstance(value, str) else json.dumps(value)


def _figure(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 else f"{value:.1e}"


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _amount(value: float, unit: str = "") -> str:
    """1.07M, 3.2T, 4.1e15 FLOPs."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size and not unit:
            return f"{value / size:.3g}{letter}"
    return f"{value:.2g} {unit}".strip()


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
