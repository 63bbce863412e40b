"""Runs on four gloo ranks, by stages and by parts of sequences too, against one process, up to the checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_run import read_tensors, tiny_recipe, write_text

from fireflyer.errors import Stopped, UserError
from fireflyer.parallel.ranks import Many
from fireflyer.train.layout import layout_of
from fireflyer.train.loop import train
from fireflyer.train.recipe import recipe_differences
from tests.gloo_ranks import Ranks

STEPS = 20
SETTINGS = {
    "steps": STEPS,
    "batch_size": 8,
    "eval_every": 10,
    "checkpoint_every": 50,
    "ema__decay": 0.9,
    "data__mask_documents": True,
    "model__num_hidden_layers": 4,
    "model__initializer_range": 0.1,
    "balance__sequence_alpha": 0.01,
    "parallel__micro_batch_size": 1,
}
STAGES = {"parallel__pp": 2, "parallel__dp": 2}
PARTS = {"parallel__cp": 2, "parallel__dp": 2, "parallel__ep": 4, "parallel__zero": 3}
BOTH = {"parallel__pp": 2, "parallel__cp": 2, "parallel__ep": 2, "parallel__schedule": "dualpipev"}


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text.jsonl", 300))


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_recipe(text, **SETTINGS), run_dir)
    return run_dir


def run_to(step: int, text: str, run_dir: str, layout: dict[str, object]) -> None:
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    Many.close = lambda self: None  # the processes go on to the next check
    seen = 0

    def on_event(event: object) -> None:
        nonlocal seen
        seen = max(seen, event.metrics.step) if hasattr(event, "metrics") else seen

    try:
        recipe = tiny_recipe(text, **{**SETTINGS, **layout})
        train(recipe, run_dir, on_event=on_event, should_stop=lambda: seen >= step)
    except Stopped:
        assert seen == step


def assert_runs_agree(run_dir: Path, alone: Path) -> None:
    rows, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (run_dir, alone)
    )
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, theirs in zip(rows, expected, strict=True):
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_vio", "tokens", "lr", "eval_loss"):
            assert (key in row) == (key in theirs), (row["step"], key)
            if key in row:
                assert row[key] == pytest.approx(theirs[key], rel=1e-5), (row["step"], key)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("model.safetensors", "trainer.safetensors"):
        mine, theirs = read_tensors(run_dir / last / name), read_tensors(alone / last / name)
        assert mine.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if not key.startswith("rng"):
                torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-5, msg=key)
    loads = [
        [json.loads(line) for line in (run / "experts.jsonl").read_text().splitlines()] for run in (run_dir, alone)
    ]
    assert loads[0] == loads[1]


def test_one_run_on_three_layouts_is_the_run_of_one_process(ranks, text, alone, tmp_path):
    """By stages, then by parts of sequences with experts and weights shared out, then a V of stages of parts."""
    for step, layout in ((6, STAGES), (13, PARTS), (STEPS, BOTH)):
        ranks.run(run_to, step, text, str(tmp_path / "run"), layout)
    assert_runs_agree(tmp_path / "run", alone)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (STAGES | {"parallel__zero": 3}, "parallel.zero = 3 can't be combined with parallel.pp = 2.*zero=1"),
        (STAGES | {"parallel__micro_batch_size": 0}, "set parallel.micro_batch_size = 2"),
        (BOTH | {"parallel__schedule": "DualPipeV", "batch_size": 2}, "set batch_size to 4 a rank"),
        ({"parallel__pp": 4, "parallel__schedule": "interleaved"}, "pp = 2 would do"),
        ({"parallel__cp": 4, "seq_len": 20}, "parallel.cp = 4 .* 16 or 24 would"),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_what_can(settings, said):
    with pytest.raises(UserError, match=said):
        layout_of(tiny_recipe("text.jsonl", **{**SETTINGS, **settings}), 4)


def test_schedules_go_by_torchs_names_too():
    assert tiny_recipe("text.jsonl", parallel__schedule="InterleavedZeroBubble").parallel.schedule == "zero-bubble"


def test_a_micro_batch_may_change_with_the_layout_alone():
    stored, same = (tiny_recipe("text.jsonl", parallel__micro_batch_size=n) for n in (1, 2))
    assert recipe_differences(stored, same) == ["parallel.micro_batch_size: 1 -> 2"]
    other = tiny_recipe("text.jsonl", parallel__micro_batch_size=2, parallel__pp=2, parallel__dp=1)
    assert recipe_differences(stored, other) == []
