"""A smaller student taught by the reasoning demo's model, and the same student's own reinforcement learning.

Both begin from one cold start and have the same compute, counted in operations of forward and backward passes: GRPO's
with its rollouts; the teacher's answers' with the fine-tuning on them, without what trained the teacher. A tenth of it
is tried too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from fireflyer.config import load_config
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.demo.carrying import answer, cold_start, examination, harder, question
from fireflyer.demo.reason import GRPO, examine
from fireflyer.train.distill import distill
from fireflyer.train.grpo_run import open_grpo
from fireflyer.train.loop import train
from fireflyer.train.recipe import load_recipe
from fireflyer.train.sft import open_chats

SEEDS = (0, 1, 2)
STUDENT = (
    "model.hidden_size=96",
    "model.num_hidden_layers=3",
    "model.intermediate_size=256",
    "model.moe_intermediate_size=64",
)
_EXAMINED, _WATCHED, _EXAMPLES, _PROBLEMS = 500, 100, 2000, 2000
_ROW = 72
"""Tokens of a problem with its working and answer."""

_TRAINING, _FORWARD = 3, 1
"""Forward passes that a token costs: forward and backward, and being written."""

_TENTH, _WHOLE = "a tenth", "the whole"
_SHARES = {_TENTH: 0.1, _WHOLE: 1.0}
"""Of the compute of spark-grpo's steps."""


def main() -> Proof:
    """One teacher, three students."""
    with tempfile.TemporaryDirectory() as folder:
        teacher = _teacher(Path(folder))
        teachers, _ = examine(teacher, SEEDS[0])
        results = [student(Path(folder) / f"student-{seed}", teacher, seed) for seed in SEEDS]
    means = {
        share: {way: mean(r[way][share]["accuracy"] for r in results) for way in ("grpo", "distilled")}
        for share in _SHARES
    }
    figures = {"teacher_accuracy": teachers.accuracy, "seeds": results, "means": means}
    missed = [
        f"distillation beats own RL with {share} of the compute: {m['distilled']:.1%} against {m['grpo']:.1%}"
        for share, m in means.items()
        if m["distilled"] <= m["grpo"]
    ]
    return Proof(figures, {"students": _table(results)}, {}, missed)


def _teacher(folder: Path) -> Path:
    """The reasoning demo's model."""
    command = [sys.executable, "-m", "fireflyer", "demo", "--reason", "--run", f"{folder}/demo"]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return folder / "demo-reason" / GRPO


def student(folder: Path, teacher: Path, seed: int) -> dict[str, Any]:
    """A small model with its cold start, and both ways on from there, examined on problems that none was shown."""
    folder.mkdir(parents=True)
    _write_lines(folder / "cold-start.jsonl", cold_start(seed, _EXAMPLES))
    train(load_recipe("spark", [f"seed={seed}", "eval_every=0", *STUDENT]), folder / "base")
    chats, base = [str(folder / "cold-start.jsonl")], str(folder / "base")
    recipe = load_recipe("spark-cold-start", [f"seed={seed}"], sources=chats, init_from=base, base="sft")
    train(recipe, folder / "cold-start", opener=open_chats)
    return {"base": vars(examine(folder / "base", seed)[0]), **both_ways(folder, teacher, seed)}


def both_ways(folder: Path, teacher: Path, seed: int, shares: Sequence[str] = tuple(_SHARES)) -> dict[str, Any]:
    """From `folder`'s cold start on; scores by way and share of the compute."""
    watched = list(examination(seed, _EXAMINED + _WATCHED))[_EXAMINED:]
    asked = [*watched, *harder(seed, _PROBLEMS, held_out=_EXAMINED + _WATCHED)]
    _write_lines(folder / "problems.jsonl", [{"problem": question(p), "answer": answer(p)} for p in asked])
    cold = vars(examine(folder / "cold-start", seed)[0])
    found: dict[str, Any] = {"seed": seed, "cold_start": cold, "grpo": {}, "distilled": {}}
    for share in shares:
        found["grpo"][share], flops = _own_grpo(folder, seed, share)
        found["distilled"][share] = _distilled(folder, teacher, seed, share, flops)
    return found


def _own_grpo(folder: Path, seed: int, share: str) -> tuple[dict[str, Any], float]:
    """The student after GRPO, and how many operations that was."""
    environment, cold = f"grpo.environment={json.dumps(str(folder / 'problems.jsonl'))}", folder / "cold-start"
    overrides = [f"seed={seed}", environment, "eval_every=0"]
    steps = load_recipe("spark-grpo", overrides, init_from=str(cold), base="grpo").steps
    assert steps is not None
    overrides.append(f"steps={round(steps * _SHARES[share])}")
    recipe = load_recipe("spark-grpo", overrides, init_from=str(cold), base="grpo")
    run = folder / f"grpo {share}"
    trained = train(recipe, run, opener=open_grpo)
    flops = trained.step * recipe.batch_size * _ROW * (_TRAINING + _FORWARD) * _forward_flops(cold)
    return {**vars(examine(run, seed)[0]), "steps": trained.step, "flops": flops, "train_s": trained.train_s}, flops


def _distilled(folder: Path, teacher: Path, seed: int, share: str, flops: float) -> dict[str, Any]:
    """The student after a distillation of so many operations, of which at most a quarter are the teacher's answers."""
    cold, an_answer = folder / "cold-start", _ROW * _FORWARD * _forward_flops(teacher)
    problems = min(_PROBLEMS, int(flops / 4 / an_answer))
    a_step = 32 * _ROW * (_TRAINING * _forward_flops(cold) + mtp_training_flops_per_token(load_config(cold), _ROW))
    steps = int((flops - problems * an_answer) / a_step)
    overrides = [
        f"seed={seed}",
        f"steps={steps}",
        "batch_size=32",
        f"seq_len={_ROW + 8}",
        "eval_every=0",
        "schedule.lr=1e-3",
        'schedule.warmup_steps="4%"',
        'schedule.constant_until="4%"',
        "schedule.cosine_lr=1e-4",
        f"distill.teacher={json.dumps(str(teacher))}",
        f"distill.environment={json.dumps(str(folder / 'problems.jsonl'))}",
        f"distill.problems={problems}",
        f"distill.held_out={_WATCHED}",
        "distill.samples=1",
        "distill.max_answer_tokens=58",
    ]
    run = folder / f"distilled {share}"
    trained, counts = distill(load_recipe(None, overrides, init_from=str(cold), base="distill"), run)
    score, _ = examine(run, seed)
    return {**vars(score), "steps": steps, "asked": counts.answers, "kept": counts.kept, "train_s": trained.train_s}


def _forward_flops(run: Path) -> float:
    """Of a token, by the main model."""
    return training_flops_per_token(load_config(run), _ROW) / _TRAINING


def _table(results: list[dict[str, Any]]) -> Table:
    columns = ["seed", "the student", "cold start"]
    rows = [[r["base"]["accuracy"], r["cold_start"]["accuracy"]] for r in results]
    for share in _SHARES:
        columns += [f"own GRPO, {share}", f"distilled, {share}"]
        for row, result in zip(rows, results, strict=True):
            row += [result["grpo"][share]["accuracy"], result["distilled"][share]["accuracy"]]
    named = [
        *zip([str(r["seed"]) for r in results], rows, strict=True),
        ("mean", [mean(c) for c in zip(*rows, strict=True)]),
    ]
    return Table(columns, [[name, *(f"{share:.1%}" for share in row)] for name, row in named])


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
