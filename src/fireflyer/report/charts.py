"""From a run's numbers to charts, described and not yet drawn: the page and the PNG files draw the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fireflyer.report.run_data import RunData

MOST_POINTS = 1200
"""A line of a chart; longer runs are thinned to means of equal stretches."""


@dataclass(frozen=True)
class Line:
    """One curve: `values` over `tokens` (and the steps they were at). dashed: a second quantity of the same run."""

    name: str
    run: int
    steps: list[int]
    tokens: list[int]
    values: list[float]
    dashed: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Chart:
    """`why` is what a reader who wasn't there should look for. log: a logarithmic axis of values."""

    key: str
    title: str
    unit: str
    why: str
    lines: list[Line]
    log: bool = False


@dataclass(frozen=True)
class _Kind:
    title: str
    unit: str
    why: str
    columns: dict[str, str]
    """metrics.jsonl's key to the curve's name."""
    log: bool = False


_KINDS = {
    "loss": _Kind(
        "Loss",
        "nats a token",
        "How surprised the model is by the next token: on the training text, by the MTP module on the token after, and"
        " on text that it never saw. It should fall all the way; a held-out loss that rises while the training loss"
        " falls means that the text is being learnt by heart.",
        {"loss": "training", "mtp_loss": "MTP", "eval_loss": "held out"},
    ),
    "bits_per_byte": _Kind(
        "Held-out bits per byte",
        "bits",
        "The same on unseen text, per byte of it, so that models with different tokenizers can be compared. 8 is no"
        " model at all.",
        {"bits_per_byte": "held out"},
    ),
    "reward": _Kind(
        "Reward",
        "mean of a group's answers",
        "What the graders gave. It should rise; flat from the start means that no answer, or every answer, is right.",
        {"reward": "reward", "format_reward": "format"},
    ),
    "accuracy": _Kind(
        "Right answers",
        "share",
        "In training, and on problems kept for examination. Of preferences: pairs whose chosen answer is the likelier.",
        {"accuracy": "training", "eval_accuracy": "held out"},
    ),
    "length": _Kind(
        "Answer length", "tokens", "Thinking that pays grows longer; padding does too.", {"length": "mean"}
    ),
    "kl": _Kind(
        "Distance from the reference", "nats a token", "How far the policy has moved (KL, k3 estimator).", {"kl": "KL"}
    ),
    "entropy": _Kind(
        "Entropy", "nats a token", "How much the policy still explores; near 0 it only repeats itself.", {"entropy": ""}
    ),
    "clip": _Kind("Clipped tokens", "share", "Tokens whose ratio left the clip range.", {"clip_share": "clipped"}),
    "preference": _Kind(
        "Preferences",
        "nats times β",
        "How much likelier than the reference the model finds the chosen and the rejected answers, and the difference.",
        {"reward_margin": "margin", "chosen_reward": "chosen", "rejected_reward": "rejected"},
    ),
    "lr": _Kind("Learning rate", "", "The schedule as it was carried out.", {"lr": "learning rate"}),
    "grad_norm": _Kind(
        "Gradient norm",
        "before clipping",
        "Spikes tell of batches that pulled hard; a rise that stays, of a rate that is too high.",
        {"grad_norm": "gradient norm"},
        log=True,
    ),
    "max_vio": _Kind(
        "MaxVio",
        "busiest expert's load over the mean, minus 1",
        "How unevenly the experts of the worst layer are used in a batch. 0 is even; the gate bias pulls it there.",
        {"max_vio": "MaxVio"},
    ),
    "mtp_acceptance": _Kind(
        "MTP acceptance",
        "share of drafted tokens",
        "How often the MTP module guesses what the model itself says next: what speculation will gain.",
        {"mtp_acceptance": "accepted"},
    ),
    "speed": _Kind("Speed", "tokens a second", "A drop tells of a machine that was busy.", {"tokens_per_s": "speed"}),
    "memory": _Kind("Memory", "GiB, peak of the process", "It should level off.", {"peak_memory_bytes": "peak"}),
}
_GIB = {"peak_memory_bytes"}
_PLAIN = {"step", "tokens", "balance_loss", "batch_size", "epoch", "train_s"}


def charts(runs: Sequence[RunData]) -> list[Chart]:
    """All charts that the runs have numbers for, each with the curves of every run."""
    found = []
    for key, kind in _KINDS.items():
        lines = _lines(kind.columns, runs)
        if lines:
            found.append(Chart(key, kind.title, kind.unit, kind.why, lines, kind.log))
    shown = {column for kind in _KINDS.values() for column in kind.columns} | _PLAIN
    others = dict.fromkeys(key for run in runs for row in (run.steps[0], run.steps[-1]) for key in row)
    for column in others:
        if column not in shown and (lines := _lines({column: column}, runs)):
            found.append(Chart(column, column.replace("_", " "), "", "", lines))
    return found


def _lines(columns: dict[str, str], runs: Sequence[RunData]) -> list[Line]:
    found = []
    for number, run in enumerate(runs):
        for place, (column, name) in enumerate(columns.items()):
            rows = [row for row in run.steps if _is_number(row.get(column))]
            if not rows or (column == "mtp_loss" and not run.model.num_nextn_predict_layers):
                continue
            sparse = len(rows) * 2 < len(run.steps)
            values = [row[column] / (2**30 if column in _GIB else 1) for row in rows]
            steps, tokens, values = _thinned([row["step"] for row in rows], [row["tokens"] for row in rows], values)
            label = " ".join(filter(None, (run.name if len(runs) > 1 else "", name)))
            found.append(Line(label, number, steps, tokens, values, dashed=place > 0, marks=sparse))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _thinned(steps: list[int], tokens: list[int], values: list[float]) -> tuple[list[int], list[int], list[float]]:
    """At most MOST_POINTS: the mean of each stretch, at its last step."""
    count = len(values)
    if count <= MOST_POINTS:
        return steps, tokens, values
    edges = [round(place * count / MOST_POINTS) for place in range(MOST_POINTS + 1)]
    stretches = list(pairwise(edges))
    return (
        [steps[stop - 1] for _, stop in stretches],
        [tokens[stop - 1] for _, stop in stretches],
        [math.fsum(values[start:stop]) / (stop - start) for start, stop in stretches],
    )


@dataclass(frozen=True)
class HeatMap:
    """One MoE layer over time: rows of `load` are moments, columns experts; 1 is an even share. `bias` alike."""

    run: int
    layer: int
    steps: list[int]
    load: list[list[float]]
    bias: list[list[float]]


def heat_maps(runs: Sequence[RunData]) -> list[HeatMap]:
    """By run, then by layer; none where a run kept no record of its experts."""
    found = []
    for number, run in enumerate(runs):
        layers = [int(layer) for layer in run.experts[-1]["load"]] if run.experts else []
        for layer in layers:
            rows = [row for row in run.experts if str(layer) in row["load"]]
            found.append(
                HeatMap(
                    number,
                    layer,
                    [row["step"] for row in rows],
                    [row["load"][str(layer)] for row in rows],
                    [row["bias"][str(layer)] for row in rows if str(layer) in row["bias"]],
                )
            )
    return found
