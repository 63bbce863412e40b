"""Two gloo ranks in one run: whose rows are whose, what both are told, and what a save keeps while training goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_run import read_tensors, tiny_recipe, write_text

from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.errors import Stopped, UserError
from fireflyer.parallel.ranks import Many
from fireflyer.train import setup
from fireflyer.train.loop import Trainer, train
from fireflyer.train.ranks import join_ranks
from fireflyer.train.run_files import RunFiles
from tests.gloo_ranks import Ranks

STEPS = 8
EXPERTS = {"parallel__ep": 2, "parallel__zero": 2}


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return str(write_text(tmp_path_factory.mktemp("data") / "text.jsonl", 300))


def begin() -> None:
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    Many.close = lambda self: None  # the processes go on to the next check


def run_logged(text: str, run_dir: str, stop_at: int, settings: dict[str, Any]) -> list[list[list[int]]]:
    """Trains; by step, the rows that this process computed."""
    computed: list[list[list[int]]] = []
    unlogged = Trainer.forward_backward

    def forward_backward(self: Trainer, batch: Any) -> Any:
        share = self.ranks.share(batch.input_ids_BT.shape[0])
        computed.append(batch.input_ids_BT[share].tolist())
        return unlogged(self, batch)

    Trainer.forward_backward = forward_backward
    try:
        train(tiny_recipe(text, **settings), run_dir, should_stop=lambda: len(computed) == stop_at)
    except Stopped:
        pass
    finally:
        Trainer.forward_backward = unlogged
    return computed


def run_on_ranks(*args: Any) -> list[list[list[int]]]:
    begin()
    return run_logged(*args)


def test_every_row_is_computed_once_whoever_trains(two, text, tmp_path):
    """Two ranks, then one process, then two again: each step's rows are those of one process, and so is the end."""
    alone = run_logged(text, str(tmp_path / "alone"), STEPS, {})
    shares = two.run(run_on_ranks, text, str(tmp_path / "run"), 3, EXPERTS)
    middle = run_logged(text, str(tmp_path / "run"), 2, {})
    last = two.run(run_on_ranks, text, str(tmp_path / "run"), STEPS, {"parallel__zero": 3})
    steps = [a + b for a, b in zip(*shares, strict=True)] + middle + [a + b for a, b in zip(*last, strict=True)]
    assert steps == alone
    folders = [newest_good_checkpoint(tmp_path / name) for name in ("run", "alone")]
    states = [json.loads((folder / "trainer.json").read_text()) for folder in folders]
    assert states[0]["data"] == states[1]["data"]
    ours, theirs = (read_tensors(folder / "model.safetensors") for folder in folders)
    biases = [name for name in theirs if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:  # counted once over ranks, experts elsewhere and recomputation: the very same
        assert torch.equal(ours[name], theirs[name])
        assert ours[name].abs().sum() > 0


def snapshot_kept(text: str, run_dir: str) -> bool:
    begin()
    recipe, ranks = join_ranks(tiny_recipe(text, ema__decay=0.5, **EXPERTS))
    inputs = setup.open_inputs(recipe, Path(run_dir), None, lambda event: None)
    trainer = Trainer(
        inputs, setup.open_state(inputs, Path(run_dir), lambda event: None, ranks), Path(run_dir), lambda event: None
    )
    trainer.step()
    kept: list[Any] = []
    save = RunFiles.save
    RunFiles.save = lambda self, step, snapshot: kept.append(snapshot)
    trainer.save()
    RunFiles.save = save
    tensors = [{**snapshot.weights, **snapshot.trainer} for snapshot in kept]
    before = [{name: tensor.clone() for name, tensor in each.items()} for each in tensors]
    trainer.step()
    trainer.close()
    assert len(kept) == (1 if ranks.is_first else 0)
    return all(
        torch.equal(tensor, was[name])
        for each, was in zip(tensors, before, strict=True)
        for name, tensor in each.items()
    )


def test_a_save_in_flight_keeps_the_step_that_it_was_begun_at(two, text, tmp_path):
    (tmp_path / "run").mkdir()
    assert two.run(snapshot_kept, text, str(tmp_path / "run")) == [True, True]


def told(text: str, run_dir: str, what: str) -> str:
    """The error that this rank ends with."""
    begin()
    log, step = RunFiles.log, Trainer.step
    if what == "disk":

        def refused(self: RunFiles, *args: Any) -> None:
            raise UserError("the disk is full")

        RunFiles.log = refused
    else:

        def poisoned(self: Trainer) -> Any:
            if dist.get_rank() == 1:
                parameter = dict(self.state.model.named_parameters())["model.layers.1.mlp.experts.down_proj"]
                with torch.no_grad():
                    self.ranks.local(parameter).fill_(float("nan"))
            return step(self)

        Trainer.step = poisoned
    try:
        train(tiny_recipe(text, **EXPERTS), run_dir)
    except UserError as error:
        return str(error)
    finally:
        RunFiles.log, Trainer.step = log, step
    return "nothing"


def test_what_one_rank_meets_all_are_told(two, text, tmp_path):
    assert two.run(told, text, str(tmp_path / "disk"), "disk") == ["the disk is full"] * 2
    first, second = two.run(told, text, str(tmp_path / "nan"), "nan")
    assert first == second
    assert "failed at step 1" in first
    assert "the weights of model.layers.1.mlp.experts.down_proj" in first
