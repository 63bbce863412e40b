"""Every legal layout of 1, 2 and 4 ranks against one process: the first batch's gradients, and 20 steps.

And one run that goes from layout to layout: a step on each, stopped, saved and gone on with on the next. Where two
experts' scores lie within rounding of each other, another order of sums may choose the other one, in fp32 above all;
with this seed none come nearer than 2e-5 in the whole run.
"""

from __future__ import annotations

import json
import os
import random
import socket
import tempfile
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._result import Proof, Table
from fireflyer.errors import Stopped, UserError
from fireflyer.train.layout import layout_of
from fireflyer.train.recipe import load_recipe

if TYPE_CHECKING:  # torch itself loads in the ranks' processes
    from fireflyer.train.settings import Recipe

STEPS = 20
WORLDS = (2, 4)
WALKED = 24
"""Layouts that the wandering run visits."""
SCHEDULES = ("1f1b", "interleaved", "zero-bubble", "dualpipev")
LIMITS = {"fp32": 1e-5, "fp64": 1e-9}
SETTINGS = {
    "seed": 8,
    "steps": STEPS,
    "batch_size": 8,
    "seq_len": 16,
    "eval_every": 0,
    "threads": 1,
    "data.mask_documents": True,
    "schedule.warmup_steps": 2,
    "balance.sequence_alpha": 0.01,
    "model.vocab_size": 300,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 7,
    "model.first_k_dense_replace": 5,
    "model.intermediate_size": 48,
    "model.num_attention_heads": 2,
    "model.q_lora_rank": 16,
    "model.kv_lora_rank": 16,
    "model.qk_nope_head_dim": 8,
    "model.qk_rope_head_dim": 8,
    "model.v_head_dim": 8,
    "model.n_routed_experts": 8,
    "model.num_experts_per_tok": 2,
    "model.moe_intermediate_size": 16,
    "model.n_group": 2,
    "model.topk_group": 1,
    "model.num_nextn_predict_layers": 1,
    "model.initializer_range": 0.1,
}
WORDS = "alpha beta gamma delta the of and a house river stone light (x + y) := 12 naïve 火".split()
COMPARED = ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio")


@dataclass(frozen=True)
class Case:
    """One layout of so many ranks, and the numbers' precision."""

    world: int
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 1
    schedule: str = "1f1b"
    precision: str = "fp32"

    def recipe(self, text: str, **settings: object) -> Recipe:
        keys = ("pp", "dp", "cp", "ep", "zero", "schedule")
        given = {**SETTINGS, **{f"parallel.{key}": getattr(self, key) for key in keys}, **settings}
        given["parallel.micro_batch_size"] = 1 if self.pp > 1 else 2  # pipelines need many
        return load_recipe(None, [f"{key}={str(value).lower()}" for key, value in given.items()], sources=[text])

    def is_legal(self) -> bool:
        try:
            layout_of(self.recipe("text.jsonl"), self.world)
        except UserError:
            return False
        return True


def main() -> Proof:
    """The sweep, then the wandering run."""
    with tempfile.TemporaryDirectory() as folder:
        text = _write_text(Path(folder) / "text.jsonl")
        alone = Case(1)
        expected = {precision: _run(1, [replace(alone, precision=precision)], text)[0] for precision in LIMITS}
        rows, figures, missed = [], [], []
        for world in WORLDS:
            cases = layouts(world)
            both = [replace(case, precision=precision) for case in cases for precision in LIMITS]
            found = dict(zip(both, _run(world, both, text), strict=True))
            for case in cases:
                gaps = {}
                for precision, limit in LIMITS.items():
                    gaps[precision] = gap(found[replace(case, precision=precision)], expected[precision])
                    for what, value in gaps[precision].items():
                        if not value <= limit:
                            missed.append(f"{_named(case)}: {what} within {limit:g} in {precision}, found {value:.2g}")
                figures.append({**_numbers(case), **{f"{p}_{w}": v for p, gap in gaps.items() for w, v in gap.items()}})
                worst = [f"{gaps[precision][what]:.1e}" for precision in LIMITS for what in ("steps", "gradients")]
                rows.append([*_numbers(case).values(), *worst])
        walk = [case for world in WORLDS for case in layouts(world)]
        random.Random(0).shuffle(walk)
        wandered = _wander([alone, *walk[:WALKED], alone], text, Path(folder))
        if wandered > LIMITS["fp32"]:
            missed.append(f"a run over many layouts within {LIMITS['fp32']:g} of one process, found {wandered:.2g}")
    worst = {
        f"{precision}_{what}": max(row[f"{precision}_{what}"] for row in figures)
        for precision in LIMITS
        for what in ("steps", "gradients")
    }
    columns = ["ranks", "pp", "dp", "cp", "ep", "zero", "schedule"]
    columns += [f"{what}, {precision}" for precision in LIMITS for what in ("20 steps", "gradients")]
    return Proof(
        {"layouts": len(figures), "worst": worst, "wandering_run": wandered, "each": figures},
        {"layouts": Table(columns, rows)},
        missed=missed,
    )


def layouts(world: int) -> list[Case]:
    """All that this model and its batches can be shared out by."""
    found = []
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for pp, dp, cp, ep, zero, schedule in product(sizes, sizes, sizes, sizes, (1, 2, 3), SCHEDULES):
        case = Case(world, pp, dp, cp, ep, zero, schedule)
        if pp * dp * cp == world and (pp > 1 or schedule == SCHEDULES[0]) and case.is_legal():
            found.append(case)
    return found


def gap(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """steps: the largest relative difference of a metric of a step; gradients: of a parameter's gradient, by norm."""
    steps = max(
        abs(mine[key] - theirs[key]) / max(abs(theirs[key]), 1e-12)
        for mine, theirs in zip(found["steps"], expected["steps"], strict=True)
        for key in COMPARED
    )
    gradients, theirs = found["gradients"], expected["gradients"]
    assert gradients.keys() == theirs.keys()
    return {
        "steps": steps,
        "gradients": max(float((gradients[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs),
    }


def _run(world: int, cases: list[Case], text: str) -> list[dict[str, Any]]:
    """What each case came to, by the first of so many processes."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        _spawn(world, _rank_sweep, (cases, text, folder))
        return [torch.load(Path(folder) / f"{number}.pt") for number in range(len(cases))]


def _wander(cases: list[Case], text: str, folder: Path) -> float:
    """One run, a step on each layout; the largest relative difference of a loss from one process's run."""
    steps = len(cases)
    for number, case in enumerate(cases):
        _spawn(case.world, _rank_walk, (case, text, str(folder / "walk"), steps, number == steps - 1))
    _spawn(1, _rank_walk, (Case(1), text, str(folder / "whole"), steps, True))
    rows = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("walk", "whole")
    ]
    return max(abs(mine["loss"] - theirs["loss"]) / theirs["loss"] for mine, theirs in zip(*rows, strict=True))


def _spawn(world: int, function: Any, args: tuple[Any, ...]) -> None:
    from torch.multiprocessing.spawn import spawn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(_enter, (world, port, function, args), nprocs=world)


def _enter(rank: int, world: int, port: int, function: Any, args: tuple[Any, ...]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    torch.set_num_threads(1)
    function(*args)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _rank_sweep(cases: list[Case], text: str, folder: str) -> None:
    import torch

    from fireflyer.train import setup
    from fireflyer.train.loop import Trainer
    from fireflyer.train.ranks import join_ranks

    first_model = setup._first_model
    for number, case in enumerate(cases):
        double = case.precision == "fp64"
        setup._first_model = (lambda *args: first_model(*args).double()) if double else first_model
        recipe, ranks = join_ranks(case.recipe(text))
        run_dir = Path(folder) / f"run-{number}"
        run_dir.mkdir(exist_ok=True)
        inputs = setup.open_inputs(recipe, run_dir, None, lambda event: None)
        trainer = Trainer(inputs, setup.open_state(inputs, run_dir, lambda event: None, ranks), run_dir, _ignore)
        trainer.forward_backward(trainer.state.objective.next_batch(recipe.batch_size))
        named = trainer.state.model.named_parameters()
        gradients = {name: ranks.whole(name, p.grad).cpu() for name, p in named if p.grad is not None}
        gradients = ranks.of_all_layers(gradients)
        trainer.state.optimizer.zero_grad()
        steps = [trainer.step().row() for _ in range(STEPS)]
        trainer.close()
        if ranks.is_first:
            torch.save({"steps": steps, "gradients": gradients}, Path(folder) / f"{number}.pt")


def _rank_walk(case: Case, text: str, run_dir: str, steps: int, to_the_end: bool) -> None:
    from fireflyer.train.loop import train

    try:
        train(case.recipe(text, steps=steps), run_dir, should_stop=lambda: not to_the_end)
    except Stopped:
        assert not to_the_end


def _ignore(event: object) -> None:
    """Events aren't shown."""


def _numbers(case: Case) -> dict[str, int | str]:
    numbers = {"ranks": case.world, "pp": case.pp, "dp": case.dp, "cp": case.cp, "ep": case.ep, "zero": case.zero}
    return {**numbers, "schedule": case.schedule if case.pp > 1 else ""}


def _named(case: Case) -> str:
    return ", ".join(f"{key} {value}" for key, value in _numbers(case).items() if value)


def _write_text(path: Path) -> str:
    draw = random.Random(0)
    lines = [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 30))) for _ in range(400)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return str(path)
