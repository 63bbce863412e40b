"""The hard demo from two seeds: held-out accuracy by kind, on numbers one digit longer than trained, and the bill."""

from __future__ import annotations

from typing import Any

from benchmarks._demos import run_demos
from benchmarks._result import Proof, Table

SEEDS = (0, 1)
ACCURACY, TRAIN_S = 0.95, 1200


def main() -> Proof:
    """Two demos, one after the other; the first one's receipt is the docs' output."""
    summaries, shown, missed = run_demos(SEEDS, "demo-hard", ("--hard",), accuracy=ACCURACY, train_s=TRAIN_S)
    figures = {
        "seeds": summaries,
        "accuracy_min": min(s["accuracy"] for s in summaries),
        "longer_accuracy_max": max(s["longer_accuracy"] for s in summaries),
        "train_s_max": max(s["train_s"] for s in summaries),
    }
    outputs = {"receipt": shown[shown.index("\n\n") + 2 :]}
    return Proof(figures, {"kinds": _kinds(summaries)}, outputs, missed)


def _kinds(summaries: list[dict[str, Any]]) -> Table:
    columns = ["kind"]
    for seed in SEEDS:
        columns += [f"seed {seed}: as long as trained", f"seed {seed}: one digit longer"]
    rows = []
    for kind in summaries[0]["kinds"]:
        row = [kind]
        for summary in summaries:
            score = summary["kinds"][kind]
            row += [f"{score['right']} of {score['held_out']}", f"{score['longer_right']} of {score['longer']}"]
        rows.append(row)
    return Table(columns, rows)
