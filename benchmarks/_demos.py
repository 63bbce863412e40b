"""A demo from several seeds, one after the other, as its command runs it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks._result import ROOT


def run_demos(
    seeds: Sequence[int], name: str, options: Sequence[str], *, accuracy: float, train_s: float
) -> tuple[list[dict[str, Any]], str, list[str]]:
    """The summaries by seed, what the first one printed, and which fell short. name: of the run's folder."""
    summaries, shown, missed = [], "", []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            run = f"{folder}/{name}"
            command = [sys.executable, "-m", "fireflyer", "demo", *options, "--seed", str(seed), "--run", run]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            with open(f"{run}/summary.json", encoding="utf-8") as file:
                summary = json.load(file)
        summaries.append(summary)
        shown = shown or done.stdout.replace(folder, "runs")
        if summary["accuracy"] < accuracy:
            missed.append(f"seed {seed}: {accuracy:.0%} of held-out problems right: {summary['accuracy']:.1%}")
        if summary["train_s"] > train_s:
            missed.append(f"seed {seed}: training under {train_s} s: {summary['train_s']:.0f} s")
    return summaries, shown, missed
