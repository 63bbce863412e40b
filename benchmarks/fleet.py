"""Three users' trainers on one node while the controller is killed again and again; a deaf job; TERM to next launch."""

from __future__ import annotations

import json
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from benchmarks._slurm import SlurmCluster, missing
from benchmarks.resume import finish, outcome
from fireflyer.errors import UserError
from fireflyer.fleet.channel import ask
from fireflyer.fleet.folder import StateFolder

USERS = ("alice", "bob", "carol")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
SLICES, KILLS, SLICE_S, STEPS = 20, 20, 4.0, 2400
SEEDS = (1, 2, 3)
TERM_TO_LAUNCH_S = 2.0
DEADLINE_S = 1.0
_LIMIT_S = 900.0

# Counts every 50 ms, saves every tenth count, and does not hear TERM. argv: FILE
DEAF = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from fireflyer.fleet.job import Job
job, path = Job(bool), sys.argv[1]
step = int(open(path).read()) if os.path.exists(path) else 0
print("begin", step, flush=True)
while True:
    time.sleep(0.05)
    step += 1
    if step % 10 == 0:
        with open(path + ".part", "w") as file:
            file.write(str(step))
        os.replace(path + ".part", path)
        job.saved(step)
"""


def trainer(steps: int, seed: int) -> list[str]:
    """Arguments of a small run with all parts of the recipe; --run is to be added."""
    settings: dict[str, Any] = {
        "steps": steps,
        "seed": seed,
        "batch_size": 4,
        "seq_len": 24,
        "checkpoint_every": 60,
        "eval_every": 0,
        "threads": 1,
        "ema.decay": 0.9,
        **{f"model.{key}": value for key, value in SHAPE.items()},
    }
    return ["--data", "builtin:arithmetic", *(f"--set={key}={value}" for key, value in settings.items())]


class Fleet:
    """A real controller in a process of its own, and what its users ask of it."""

    def __init__(self, state: Path, options: Sequence[str]) -> None:
        self.state = state
        self._options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start the controller, and wait until it answers."""
        command = [sys.executable, "-m", "fireflyer", "fleet", "up", "--foreground", "--as-me"]
        with (self.state.parent / "controller.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--state", str(self.state), *self._options],
                env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + 60
        while True:
            try:
                self.ask("ping")
                return
            except UserError:
                if self._process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((self.state.parent / "controller.log").read_text()[-2000:]) from None
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def ask(self, what: str, **arguments: Any) -> Any:
        return ask(StateFolder(self.state).socket, what, **arguments)

    def submit(self, user: str, argv: Sequence[str], **changes: Any) -> int:
        given = {
            "key": secrets.token_hex(8),
            "user": user,
            "name": "job",
            "argv": list(argv),
            "cwd": str(self.state.parent),
            "env": {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            "umask": 0o22,
            "nodes": 1,
            "run_dir": None,
            "deadline_s": None,
            "restarts": 0,
            "limit_s": None,
            "wait_for_nodes": False,
        }
        return self.ask("submit", **{**given, **changes})["task"]

    def status(self, task: int) -> dict[str, Any]:
        return self.ask("status", task=task)

    def finish(self, tasks: Sequence[int]) -> list[dict[str, Any]]:
        """Wait until all have ended."""
        until = time.monotonic() + _LIMIT_S
        while any((shown := self.status(task))["state"] in ("waiting", "running", "stopping") for task in tasks):
            if time.monotonic() > until:
                raise TimeoutError(f"not done in {_LIMIT_S:g} s: {shown}")
            time.sleep(0.1)
        return [self.status(task) for task in tasks]


@contextmanager
def running_fleet(folder: Path, options: Sequence[str]) -> Iterator[Fleet]:
    fleet = Fleet(folder / "state", options)
    try:
        yield fleet
    finally:
        fleet.ask("down", suspend=False)
        fleet.kill()


@dataclass(frozen=True)
class Shared:
    """What came of trainers that shared a node."""

    slices: int
    kills: int
    equal: int
    lost_s: float
    overlaps: int
    """Pairs of attempts that ran on the node at the same time."""
    changes_s: list[float]
    """From each TERM to the next command's start."""
    bad: list[str]


def share_node(
    folder: Path,
    options: Sequence[str],
    steps: int,
    slice_s: float,
    seeds: Sequence[int],
    expected: dict[int, Any],
    kills: int = 0,
) -> Shared:
    """Run a trainer per user to the end.

    Args:
        seeds: of the three users' runs.
        expected: by seed, the outcome of the same run alone.
        kills: of the controller, each a random part of a slice after the last, or a little more.
    """
    draw = random.Random(7)
    with running_fleet(folder, [*options, "--slice", str(slice_s)]) as fleet:
        tasks = []
        for user, seed in zip(USERS, seeds, strict=True):
            run = str(folder / user)
            argv = [sys.executable, "-m", "fireflyer", "pretrain", *trainer(steps, seed), "--run", run]
            tasks.append(fleet.submit(user, argv, run_dir=run))
        for _ in range(kills):
            time.sleep(draw.uniform(0.2, 1.3) * slice_s)
            fleet.kill()
            fleet.start()
        ended = fleet.finish(tasks)
    attempts = [attempt for shown in ended for attempt in shown["attempts"]]
    spans = sorted(_span(Path(attempt["folder"])) for attempt in attempts)
    bad = [f"{shown['user']}: {shown['state']}: {shown['why']}" for shown in ended if shown["state"] != "done"]
    equal = 0
    for user, seed in zip(USERS, seeds, strict=True):
        if not bad and outcome(folder / user, folder / f"exported-{user}") == expected[seed]:
            equal += 1
    return Shared(
        slices=len(attempts),
        kills=kills,
        equal=equal,
        lost_s=sum(shown["lost_s"] for shown in ended),
        overlaps=sum(later.begun < earlier.ended for earlier, later in pairwise(spans)),
        changes_s=[later.begun - earlier.asked for earlier, later in pairwise(spans) if earlier.asked is not None],
        bad=bad,
    )


@dataclass(frozen=True, order=True)
class Span:
    """One attempt by its own records, in wall time."""

    begun: float
    ended: float
    asked: float | None = None


def _span(folder: Path) -> Span:
    asked = folder / "asked-0.json"
    return Span(
        begun=json.loads((folder / "started-0.json").read_text())["at"],
        ended=(folder / "ended-0.json").stat().st_mtime,
        asked=json.loads(asked.read_text())["at"] if asked.exists() else None,
    )


@dataclass(frozen=True)
class Deaf:
    """How a job ended that does not hear TERM."""

    stop_s: float
    lost_s: float
    unsaved_s: float
    """What its own count says was after its last save, the deadline included."""
    resumed_where_saved: bool


def deaf_job(folder: Path, options: Sequence[str]) -> Deaf:
    """Let another user's job take its node, and look at what it lost."""
    folder.mkdir(exist_ok=True)
    with running_fleet(folder, [*options, "--slice", "1.3"]) as fleet:
        deaf = fleet.submit("alice", [sys.executable, "-c", DEAF, str(folder / "count")], deadline_s=DEADLINE_S)
        time.sleep(0.5)
        fleet.finish([fleet.submit("bob", ["sleep", "0.3"])])
        while len((shown := fleet.status(deaf))["attempts"]) < 2 or not _said(shown["attempts"][1]):
            time.sleep(0.05)
        saved = int((Path(shown["attempts"][0]["folder"]) / "saved.json").read_text().split(":")[1].split(",")[0])
        fleet.ask("stop", task=deaf)
        fleet.finish([deaf])
    first = shown["attempts"][0]
    assert first["outcome"] == "unsaved", first
    began = int(_said(shown["attempts"][1]).split()[1])
    since_save_s = (Path(first["folder"]) / "ended-0.json").stat().st_mtime
    since_save_s -= json.loads((Path(first["folder"]) / "saved.json").read_text())["at"]
    return Deaf(first["stop_s"], first["lost_s"], since_save_s, began == saved)


def _said(attempt: dict[str, Any]) -> str:
    path = Path(attempt["folder"]) / "output.log"
    return path.read_text() if path.exists() else ""


def main() -> Proof:
    """Both back ends; Slurm also with its own default scheduling delay."""
    if reason := missing():
        raise RuntimeError(f"the proof needs Slurm: {reason}")
    figures: dict[str, Any] = {}
    rows: list[list[str | int | float]] = []
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = {seed: alone(folder / f"alone-{seed}", STEPS, seed)[0] for seed in SEEDS}
        figures["local"] = _measure("local", folder / "local", ["--backend", "local"], expected, rows, missed)
        for label, scheduler in (("slurm", "batch_sched_delay=0"), ("slurm, its defaults", "")):
            place = folder / label.replace(", ", "-").replace(" ", "-")
            with _slurm(place, scheduler):
                key = "slurm" if scheduler else "slurm_defaults"
                figures[key] = _measure(label, place, ["--backend", "slurm"], expected, rows, missed, bool(scheduler))
    columns = [
        "back end", "slices", "controller kills", "models equal", "work lost, s", "at once on the node",
        "TERM to next launch: median, s", "longest, s", "deaf job killed after, s", "it lost, s",
    ]  # fmt: skip
    return Proof(figures=figures, tables={"shared": Table(columns, rows)}, missed=missed)


def alone(folder: Path, steps: int, seed: int) -> tuple[Any, float]:
    """What a trainer comes to with nobody beside it, and its seconds."""
    began = time.monotonic()
    finish(trainer(steps, seed), folder / "run")
    return outcome(folder / "run", folder / "exported"), time.monotonic() - began


def _measure(
    label: str,
    folder: Path,
    options: Sequence[str],
    expected: dict[int, Any],
    rows: list[list[str | int | float]],
    missed: list[str],
    bounded: bool = True,
) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    shared = share_node(folder, options, STEPS, SLICE_S, SEEDS, expected, kills=KILLS)
    deaf = deaf_job(folder / "deaf", options)
    middle, longest = statistics.median(shared.changes_s), max(shared.changes_s)
    checks = {
        f"{SLICES} slices: {shared.slices}": shared.slices >= SLICES,
        f"all models equal: {shared.equal} of {len(USERS)} {shared.bad}": shared.equal == len(USERS),
        f"one at a time on the node: {shared.overlaps} overlaps": not shared.overlaps,
        f"TERM to next launch under {TERM_TO_LAUNCH_S:g} s: median {middle:.2f} s": middle < TERM_TO_LAUNCH_S
        or not bounded,
        f"deaf job dies at {DEADLINE_S:g} s: {deaf.stop_s:.2f} s": deaf.stop_s < DEADLINE_S + 1,
        f"deaf job loses what followed its last save, {deaf.unsaved_s:.2f} s: {deaf.lost_s:.2f} s": (
            abs(deaf.lost_s - deaf.unsaved_s) < 0.2
        ),
        "deaf job goes on from its last save": deaf.resumed_where_saved,
    }
    missed += [f"{label}: {check}" for check, good in checks.items() if not good]
    rows.append(
        [
            *(label, shared.slices, shared.kills, f"{shared.equal} of {len(USERS)}", f"{shared.lost_s:.1f}"),
            *(shared.overlaps, f"{middle:.2f}", f"{longest:.2f}", f"{deaf.stop_s:.2f}", f"{deaf.lost_s:.2f}"),
        ]
    )
    return {
        "slices": shared.slices,
        "kills": shared.kills,
        "equal_models": shared.equal,
        "lost_s": shared.lost_s,
        "overlaps": shared.overlaps,
        "term_to_launch_median_s": middle,
        "term_to_launch_max_s": longest,
        "deaf_stop_s": deaf.stop_s,
        "deaf_lost_s": deaf.lost_s,
    }


@contextmanager
def _slurm(folder: Path, scheduler: str) -> Iterator[None]:
    folder.mkdir()
    cluster = SlurmCluster(folder / "slurm", zones="a", scheduler=scheduler)
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        cluster.start()
        yield
    finally:
        os.environ.pop("SLURM_CONF")
        cluster.stop()
