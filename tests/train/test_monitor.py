"""The rule that stops a run, and what it leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_run import read_tensors, tiny_recipe, write_text

from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.errors import UserError
from fireflyer.train import loop
from fireflyer.train.loop import Trainer, train
from fireflyer.train.monitor import PATIENCE, LossMonitor
from fireflyer.train.setup import RunState, lay_out, open_inputs, open_state


def verdicts(losses: list[float], vocab_size: int = 300) -> list[int]:
    """The steps (from 0) at which the rule fires."""
    monitor = LossMonitor(vocab_size)
    return [i for i, loss in enumerate(losses) if monitor.see(loss) is not None]


GUESS = math.log(300)  # 5.70


def test_explosion_fires_after_patience_and_says_what():
    losses = [5.0, 4.0, 3.0, 4.0, 3.0] + [9.0] * PATIENCE
    assert verdicts(losses) == [4 + PATIENCE]
    monitor = LossMonitor(300)
    said = [monitor.see(loss) for loss in losses][-1]
    assert said == f"loss 9 after 10 steps above {GUESS + 1:.4g}, its running median 4"


@pytest.mark.parametrize(
    "losses",
    [
        [5.0] * 20 + [50.0] * (PATIENCE - 1) + [5.0] + [50.0] * (PATIENCE - 1),  # spikes that recover
        [1.0] * 50 + [GUESS + 0.9] * 50,  # a stretch of noise in the data: no model can do better than guess
        [12.0] * 50,  # weights from elsewhere that begin badly
        [6.0] * 20 + [8.9] * 50,  # high, but below 1.5 times the median
    ],
)
def test_no_alarm(losses: list[float]):
    assert verdicts(losses) == []


def test_an_explosion_does_not_raise_its_own_limit():
    """The median is over the steps before it, however long it lasts."""
    assert verdicts([5.0] * 10 + [10.0] * (PATIENCE + 3)) == [19, 20, 21, 22]


def test_history_counts_after_a_resume():
    losses = [5.0] * 10 + [10.0] * (PATIENCE - 1)
    monitor = LossMonitor(300, losses)
    assert monitor.see(10.0) is not None
    assert LossMonitor(300, losses[:-1]).see(10.0) is None


def test_a_resumed_run_knows_its_losses(tmp_path: Path):
    recipe = tiny_recipe(write_text(tmp_path / "text.jsonl", 200))
    train(recipe, tmp_path / "run")
    inputs = open_inputs(recipe, tmp_path / "run", None, lambda event: None)
    trainer = Trainer(inputs, open_state(inputs, tmp_path / "run", lambda e: None), tmp_path / "run", lambda e: None)
    trainer.close()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert list(trainer.monitor._usual) == [row["loss"] for row in rows]


def test_exploding_run_stops_and_the_checkpoint_before_stays(tmp_path: Path):
    """A learning rate of 30: loss far above a guess, for real."""
    text = write_text(tmp_path / "text.jsonl", 200)
    recipe = tiny_recipe(text, steps=60, schedule__lr=30.0, checkpoint_every=5, optimizer__grad_clip=0.0)
    with pytest.raises(UserError, match=r"training failed at step \d+: loss .* the batch is in") as error:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert newest_good_checkpoint(tmp_path / "run") is not None
    assert list((tmp_path / "run/failure").iterdir())


def open_poisoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poison) -> None:
    """Train until `poison(state)` has had its way at step 4."""
    real = Trainer.step

    def step(self: Trainer):
        if self.state.step == 3:
            poison(self.state)
        return real(self)

    monkeypatch.setattr(Trainer, "step", step)
    train(tiny_recipe(write_text(tmp_path / "text.jsonl", 200), checkpoint_every=3), tmp_path / "run")


def nan_output(state: RunState) -> None:
    state.model.model.layers[1].self_attn.register_forward_hook(lambda module, inputs, output: output * math.nan)


def nan_weight(state: RunState) -> None:
    with torch.no_grad():
        state.model.model.mtp[0].eh_proj.weight[0, 0] = math.nan


def nan_gradient(state: RunState) -> None:
    state.model.model.layers[2].self_attn.o_proj.weight.register_hook(lambda g: g * math.nan)


def nan_backward(state: RunState) -> None:
    def hook(module, inputs, output):
        output[0].register_hook(lambda g: g * math.nan)

    state.model.model.layers[1].mlp.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("poison", "layer"),
    [
        (nan_backward, "the gradient of model.layers.1.mlp"),  # and of all that lies before it
        (nan_output, "the output of model.layers.1.self_attn"),
        (nan_weight, "the weights of model.mtp.0.eh_proj.weight"),
        (nan_gradient, "the gradient of model.layers.2.self_attn.o_proj.weight"),
    ],
)
def test_non_finite_values_stop_with_step_layer_and_batch(
    poison, layer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(
        UserError, match=rf"training failed at step 4: .*; first seen in {layer}.*; the batch is in"
    ) as e:
        open_poisoned(tmp_path, monkeypatch, poison)
    assert "\n" not in str(e.value)
    run_dir = tmp_path / "run"
    monkeypatch.undo()
    path = run_dir / "failure/step-00000004.safetensors"
    assert str(path) in str(e.value)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "4"
    assert metadata["layer"].startswith(layer)
    # The batch is the one that the loader gives after three steps.
    inputs = open_inputs(tiny_recipe(tmp_path / "text.jsonl"), tmp_path / "new", None, lambda event: None)
    loader = open_state_loader(inputs, tmp_path / "new")
    batches = [loader.next_batch(4) for _ in range(4)]
    saved = read_tensors(path)
    assert torch.equal(saved["input_ids"], batches[3].input_ids_BT)
    assert torch.equal(saved["labels"], batches[3].labels_BT)
    assert saved.keys() == {"input_ids", "labels", "positions", "document_ids"}
    # The step was not taken, and the checkpoint before it is good.
    assert [json.loads(x)["step"] for x in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert (newest_good_checkpoint(run_dir) or run_dir).name == "step-00000003"


def open_state_loader(inputs, run_dir: Path):
    run_dir.mkdir()
    lay_out(inputs, run_dir)
    return open_state(inputs, run_dir, lambda event: None).objective.loader


def test_a_toy_run_stays_within_bounds(tmp_path: Path):
    """150 steps: no alarm, the loss falls, no layer collapses onto a few experts, biases stay far from their bound."""
    text = write_text(tmp_path / "text.jsonl", 400)
    recipe = tiny_recipe(text, steps=150, checkpoint_every=150, balance__bias_speed=0.01, balance__bias_until=10**9)
    worst: list[float] = []
    biases: list[torch.Tensor] = []

    class Watched(Trainer):
        def step(self):
            metrics = super().step()
            worst.append(metrics.max_vio)
            biases[:] = [bias.clone() for _, bias in self.state.model.gate_biases()]
            return metrics

    loop_trainer, loop.Trainer = loop.Trainer, Watched
    try:
        summary = train(recipe, tmp_path / "run")
    finally:
        loop.Trainer = loop_trainer
    assert summary.loss is not None
    assert summary.loss < 3.0
    assert sum(worst[-50:]) / 50 < 2  # 8 experts, 2 chosen: 3 is the same two for every token
    for bias in biases:
        assert float(bias.abs().max()) < 0.01 * 150 / 2
