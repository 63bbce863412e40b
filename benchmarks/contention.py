"""Training beside another busy process: torch's own waiting against the shorter one that the command sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks._result import ROOT, Proof, Table

STEPS, REPEATS = 40, 3
WAITING = {"torch's own": "300000", "fireflyer's": "10000"}
NEIGHBOURS = {"idle machine": 0, "one busy process beside it": 1}


def main() -> Proof:
    """Tokens a second of `spark`, the settings taking turns; spin counts of GNU's OpenMP, its default first."""
    speeds: dict[str, dict[str, list[float]]] = {place: {name: [] for name in WAITING} for place in NEIGHBOURS}
    for _ in range(REPEATS):
        for place, neighbours in NEIGHBOURS.items():
            for name, spins in WAITING.items():
                speeds[place][name].append(_tokens_per_s(spins, neighbours))
    middle = {place: {name: median(values) for name, values in row.items()} for place, row in speeds.items()}
    rows = [[place, *(f"{speed:,.0f}" for speed in row.values())] for place, row in middle.items()]
    columns = ["tokens/s", *(f"{name} waiting" for name in WAITING)]
    return Proof({"tokens_per_s": middle, "all_tokens_per_s": speeds}, {"speed": Table(columns, rows)})


def _tokens_per_s(spins: str, neighbours: int) -> float:
    """The median step of a short run."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = f"pretrain --recipe spark --set steps={STEPS} --set eval_every={STEPS}".split()
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "GOMP_SPINCOUNT": spins}
            subprocess.run(
                [sys.executable, "-m", "fireflyer", *command, "--run", f"{folder}/run"],
                cwd=folder,
                env=environment,
                capture_output=True,
                check=True,
            )
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    finally:
        for process in busy:
            process.kill()
    return median(json.loads(line)["tokens_per_s"] for line in lines[STEPS // 4 :])
