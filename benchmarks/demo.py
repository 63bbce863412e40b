"""The demo three times, from other seeds each: held-out accuracy, seconds of training, and what the receipt says."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks._demos import run_demos
from benchmarks._result import Proof, Table

SEEDS = (0, 1, 2)
ACCURACY, TRAIN_S = 0.95, 360


def main() -> Proof:
    """Three demos, one after the other; the first one's receipt is the docs' output."""
    summaries, shown, missed = run_demos(SEEDS, "demo", (), accuracy=ACCURACY, train_s=TRAIN_S)
    figures = {
        "seeds": summaries,
        "accuracy_min": min(s["accuracy"] for s in summaries),
        "accuracy_median": median(s["accuracy"] for s in summaries),
        "train_s_max": max(s["train_s"] for s in summaries),
        "train_s_median": median(s["train_s"] for s in summaries),
    }
    columns = ["seed", "right of 1,000", "two 8-digit numbers", "training", "tokens/s", "MFU", "MTP drafts accepted"]
    tables = {"seeds": Table(columns, [_row(*pair) for pair in zip(SEEDS, summaries, strict=True)])}
    outputs = {"run": f"$ fireflyer demo\n{shown}", "receipt": shown[shown.index("\n\n") + 2 :]}
    return Proof(figures, tables, outputs, missed)


def _row(seed: int, s: dict[str, Any]) -> list[str | int | float]:
    long = f"{s['correct_two_eight_digit_numbers']} of {s['two_eight_digit_numbers']}"
    right = round(s["accuracy"] * s["held_out"])
    speed = f"{s['tokens'] / s['train_s']:,.0f}"
    return [seed, right, long, f"{s['train_s']:.0f} s", speed, f"{s['mfu']:.0%}", f"{s['mtp_acceptance']:.1%}"]
