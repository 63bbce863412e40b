"""The walk that the pages show: own text, a run, the same command again, a text, an export; as a terminal has it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._result import ROOT, Proof

_TRAIN = "pretrain --recipe ember --data notes/ --run runs/mine --set steps={steps}"
COMMANDS = {
    "pretrain": _TRAIN.format(steps=60),
    "resume": _TRAIN.format(steps=80),
    "generate": 'generate runs/mine "The model" --max-tokens 24 --seed 1',
    "export": "export runs/mine exported",
    "inspect": "inspect exported",
}


def main() -> Proof:
    """Runs the commands in an empty folder whose `notes/` are this project; each must exit with 0."""
    outputs, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for part in ("docs", "src", "tests"):
            shutil.copytree(ROOT / part, Path(folder) / "notes" / part)
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            outputs[name] = f"$ fireflyer {command}\n{_run(command, folder)}"
            seconds[f"{name}_s"] = round(time.perf_counter() - began, 1)
    return Proof(figures=seconds, outputs=outputs)


def _run(command: str, folder: str) -> str:
    """What the command writes to stdout and stderr, in the order written."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "fireflyer", *shlex.split(command)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fireflyer {command}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout
