"""A run killed by SIGKILL again and again, during saves too, against one left alone: the exports must be equal."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from fireflyer.cli.main import main as fireflyer

SETTINGS = {
    "steps": 60,
    "batch_size": 8,
    "seq_len": 128,
    "checkpoint_every": 6,
    "eval_every": 20,
    "ema.decay": 0.9,
}
COMMAND = [
    "--recipe",
    "ember",
    "--data",
    "builtin:stdlib",
    *(f"--set={key}={value}" for key, value in SETTINGS.items()),
]
SEEDS, KILLS = (1, 2), 10
WALL_TIMES = ("tokens_per_s", "train_s", "peak_memory_bytes")
_LIMIT_S = 300


@dataclass(frozen=True)
class Death:
    """One kill: the last step whose metrics were on disk, and whether a checkpoint lay half written."""

    step: int
    in_save: bool


def main() -> Proof:
    """Two interrupted runs against one whole run of the same recipe."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        finish(COMMAND, whole)
        expected = outcome(whole, Path(folder) / "exported")
        rows: list[list[str | int | float]] = []
        missed = []
        for seed in SEEDS:
            run_dir = Path(folder) / f"killed-{seed}"
            deaths = kill_again_and_again(COMMAND, run_dir, kills=KILLS, seed=seed)
            finish(COMMAND, run_dir)
            equal = outcome(run_dir, Path(folder) / f"exported-{seed}") == expected
            in_saves = sum(death.in_save for death in deaths)
            rows.append([seed, len(deaths), in_saves, len({d.step for d in deaths}), "yes" if equal else "NO"])
            if not equal:
                missed.append(f"seed {seed}: the killed run's bytes equal the whole run's: they differ")
        if not sum(int(row[2]) for row in rows):
            missed.append("some kills hit a save: none did")
    columns = ["seed", "kills", "of them during a save", "at different steps", "same bytes as the whole run"]
    figures = {
        "kills": sum(int(row[1]) for row in rows),
        "kills_during_saves": sum(int(row[2]) for row in rows),
        "runs": len(rows),
        "equal_runs": sum(row[4] == "yes" for row in rows),
    }
    return Proof(figures=figures, tables={"kills": Table(columns, rows)}, missed=missed)


def kill_again_and_again(arguments: Sequence[str], run_dir: Path, *, kills: int, seed: int) -> list[Death]:
    """Start the run `kills` times and kill it each time: as a save begins, some steps on, or while starting up.

    Ends early where the run gets to its end before the kill.
    """
    draw = random.Random(seed)
    deaths: list[Death] = []
    start_s = 0.0
    for number in range(kills):
        begun = time.monotonic()
        kind = ("save", "training", "start", "save")[number % 4]
        if kind == "save":
            waits: list[Callable[[], bool]] = [_a_save_begins(run_dir)] * draw.randint(1, 2)
        elif kind == "training":
            waits = [_steps_done(run_dir, draw.randint(1, 8)), _seconds(draw.uniform(0, 0.02))]
        else:
            waits = [_seconds(start_s * draw.uniform(0.1, 1))]
        death = _kill(arguments, run_dir, waits)
        if death is None:
            break
        deaths.append(death)
        start_s = start_s or time.monotonic() - begun
    return deaths


def finish(arguments: Sequence[str], run_dir: Path) -> None:
    """Run to the end; raises if that fails."""
    result = subprocess.run(_command(arguments, run_dir), **_settings(), check=False)
    if result.returncode:
        raise RuntimeError(f"pretrain ended with {result.returncode}: {result.stderr[-2000:]}")


def outcome(run_dir: Path, folder: Path) -> dict[str, Any]:
    """What must not depend on kills: the exported files (weights and averages), the trainer's tensors, the metrics."""
    found: dict[str, Any] = {}
    options = {"": []} | ({"ema/": ["--ema"]} if "decay = 0.9" in (run_dir / "recipe.toml").read_text() else {})
    for prefix, option in options.items():
        target = folder / (prefix or "weights")
        with redirect_stdout(StringIO()):
            code = fireflyer(["export", str(run_dir), str(target), *option])
        if code:
            raise RuntimeError(f"export ended with {code}")
        found |= {prefix + path.name: _sha256(path) for path in sorted(target.iterdir())}
    checkpoint = max((run_dir / "checkpoints").iterdir())
    found["trainer"] = _sha256(checkpoint / "trainer.safetensors")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in row.items() if key not in WALL_TIMES} for row in rows]
    return found


def _kill(arguments: Sequence[str], run_dir: Path, waits: Sequence[Callable[[], bool]]) -> Death | None:
    """Start, wait until each of `waits` has been true in turn, SIGKILL. None: it ended by itself before that."""
    left_before = _unfinished(run_dir)
    process = subprocess.Popen(_command(arguments, run_dir), **_settings())
    begun = time.monotonic()
    for wait in waits:
        while not wait():
            if process.poll() is not None:
                if process.returncode:
                    raise RuntimeError(f"pretrain ended with {process.returncode}: {process.communicate()[1][-2000:]}")
                process.communicate()
                return None
            if time.monotonic() - begun > _LIMIT_S:
                process.kill()
                raise TimeoutError(f"{run_dir.name}: nothing to kill it at in {_LIMIT_S} s")
            time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return Death(step=_lines(run_dir), in_save=bool(_unfinished(run_dir) - left_before))


def _a_save_begins(run_dir: Path) -> Callable[[], bool]:
    """True once a folder is being written that wasn't when this was last true (or first asked)."""
    known: set[tuple[str, int]] = set()
    asked = False

    def begins() -> bool:
        nonlocal asked
        now = _unfinished(run_dir)
        new = bool(now - known) and asked
        asked = True
        known.clear()
        known.update(now)
        return new

    return begins


def _steps_done(run_dir: Path, number: int) -> Callable[[], bool]:
    """True once so many steps more than at any time before have their metrics on disk."""
    before = _lines(run_dir)
    return lambda: _lines(run_dir) >= before + number


def _seconds(number: float) -> Callable[[], bool]:
    until: list[float] = []

    def over() -> bool:
        until.extend([] if until else [time.monotonic() + number])
        return time.monotonic() >= until[0]

    return over


def _unfinished(run_dir: Path) -> set[tuple[str, int]]:
    """Checkpoints being written, or left so: name and inode, since a killed one's name comes again."""
    try:
        with os.scandir(run_dir / "checkpoints") as entries:
            return {(entry.name, entry.inode()) for entry in entries if entry.name.startswith(".saving")}
    except OSError:
        return set()


def _lines(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _command(arguments: Sequence[str], run_dir: Path) -> list[str]:
    return [sys.executable, "-m", "fireflyer", "pretrain", *arguments, "--run", str(run_dir)]


def _settings() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
