"""Many small training runs side by side: a process a core, with one thread each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def train_all(folder: Path, commands: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
    """Each name's `fireflyer pretrain` with these words; its metrics, step by step. The first failure ends all."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = pool.map(lambda name: _train(folder / name, commands[name]), commands)
        return dict(zip(commands, rows, strict=True))


def _train(run_dir: Path, words: Sequence[str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "fireflyer", "pretrain", "--run", str(run_dir), *words, "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{run_dir.name}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
