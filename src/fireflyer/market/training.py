"""One fold's model: trained by the recipe, stopped and resumed exactly, kept as a folder that anyone can open.

In: a Panel, a Fold, a recipe and a folder. Out: a `MarketModel`. A step is the loop's: the loss of one batch, gradients
clipped together, the optimizer, the gate biases by the batch's expert counts, the running mean of the weights. What a
step draws depends on the seed and its number alone, so that nothing but weights and moments has to be kept.

    DIR/recipe.toml · fold.json · metrics.jsonl · checkpoints/step-…/ · model/
    model/ config.json and model.safetensors in the published format; heads.safetensors; recipe.toml, fold.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fireflyer.checkpoint.run import find_checkpoint, keep_newest, remove_leftovers, write_checkpoint, write_text
from fireflyer.checkpoint.run_folder import RECIPE, MetricsLog, RunLock, writing
from fireflyer.checkpoint.trainer_state import EMA_PREFIX, read_trainer_state, write_trainer_state
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.errors import Stopped, UserError
from fireflyer.market.folds import Fold
from fireflyer.market.learning import BarLessons
from fireflyer.market.model import (
    FOLD,
    MODEL,
    MarketModel,
    new_network,
    open_network,
    read_record,
    save_model_folder,
    write_network,
)
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import MarketRecipe, load_market_recipe
from fireflyer.market.tokens import TokenLessons
from fireflyer.model.routing import expert_counts, max_violation, update_gate_bias_
from fireflyer.train import events
from fireflyer.train.average import update_average_
from fireflyer.train.monitor import is_finite
from fireflyer.train.optimizer import DecoderOptimizer, load_optimizer_tensors, optimizer_tensors
from fireflyer.train.recipe import take_stored_choices
from fireflyer.train.schedule import bias_speed, learning_rate, mtp_weight, run_steps
from fireflyer.train.summary import peak_memory_bytes
from fireflyer.train.threads import use_threads

_OPTIMIZER = "optimizer."


def train_fold(
    panel: Panel,
    fold: Fold,
    recipe: MarketRecipe,
    run_dir: str | Path,
    *,
    on_event: Callable[[events.Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> MarketModel:
    """Train a fold's model, go on with it, or find it trained. Nothing is written before all that was given is checked.

    Args:
        panel: read up to `fold.known_until` alone.
        run_dir: a new folder, or that of a run of the same recipe, fold and data.
        on_event: told what happens, see train/events.py.
        should_stop: asked after every step; once true, the run saves itself and raises Stopped.

    Raises:
        UserError: something the user can mend; Stopped: saved, the same call goes on.
    """
    run_dir = Path(run_dir)
    recipe = _with_choices(recipe, run_dir)
    lessons = (BarLessons if recipe.market.front_end == "bars" else TokenLessons)(panel, fold, recipe)
    record = _record(panel, fold, recipe, lessons)
    _check_folder(run_dir, record)
    if (run_dir / MODEL / FOLD).is_file() and read_record(run_dir / MODEL)["steps"] == run_steps(recipe.train):
        on_event(events.Finished(run_dir, run_steps(recipe.train), already=True))
        return MarketModel.load(run_dir)
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with RunLock(run_dir), use_threads(recipe.train.threads):
        with writing(run_dir):
            remove_leftovers(run_dir)
            write_text(run_dir / RECIPE, recipe.to_toml())
            write_text(run_dir / FOLD, json.dumps(record, indent=1) + "\n")
        run = _Run(lessons, recipe, record, run_dir, on_event)
        try:
            run.go(should_stop)
        finally:
            run.metrics.close()
        on_event(events.Finished(run_dir, run.step, already=False))
    return MarketModel.load(run_dir)


class _Run:
    """A fold's training in progress."""

    def __init__(
        self,
        lessons: BarLessons | TokenLessons,
        recipe: MarketRecipe,
        record: dict[str, Any],
        run_dir: Path,
        on_event: Callable[[events.Event], None],
    ) -> None:
        self.lessons, self.recipe, self.record, self.run_dir, self.on_event = lessons, recipe, record, run_dir, on_event
        self.total_steps = run_steps(recipe.train)
        self.average: dict[str, Tensor] = {}
        self.step, self.train_s = 0, 0.0
        found = find_checkpoint(run_dir)
        for line in found.damaged:
            on_event(events.Notice(f"passed over a damaged checkpoint: {line}"))
        if found.path is None:
            self.network = new_network(recipe, record["inputs"])
            lessons.set_scale_(self.network)
        else:
            self.network = open_network(found.path, recipe, record["inputs"])
        self.optimizer = DecoderOptimizer(self.network, recipe.train.optimizer)
        if found.path is not None:
            self._restore(found.path)
        self.saved_step = self.step
        self.metrics = MetricsLog(run_dir, resume_step=self.step)
        self._began = time.perf_counter() - self.train_s

    def go(self, should_stop: Callable[[], bool]) -> None:
        """Steps until the end; then the model that forecasts is written."""
        self.on_event(self._started())
        while self.step < self.total_steps:
            metrics = self.take_step()
            self.metrics.append(metrics.row())
            if self.step == self.total_steps or self.step % self.recipe.train.log_every == 0:
                self.on_event(events.StepDone(metrics, self.total_steps))
            if self.step % self.recipe.train.checkpoint_every == 0:
                self.save()
            if should_stop() and self.step < self.total_steps:
                self.save()
                raise Stopped(
                    f"{self.run_dir}: stopped and saved at step {self.step} of {self.total_steps}; the same command"
                    " goes on"
                )
        self.save()
        if self.average:
            with torch.no_grad():
                for name, parameter in self.network.named_parameters():
                    parameter.copy_(self.average[name])
        save_model_folder(self.run_dir / MODEL, self.network, self.recipe, {**self.record, "steps": self.total_steps})

    def take_step(self) -> events.StepMetrics:
        """One optimizer step, in the order of train/loop.py."""
        train, began = self.recipe.train, time.perf_counter()
        bars = train.batch_size * train.seq_len
        seen = self.step * bars
        part = self.lessons.part(self.network, self.step, mtp_weight(train, seen))
        part.loss.backward()
        limit = train.optimizer.grad_clip or float("inf")
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), limit))
        values = {name: float(value.detach()) for name, value in part.values.items()}
        if not is_finite(*values.values(), grad_norm):
            raise UserError(
                f"{self.run_dir}: training failed at step {self.step + 1}: loss {values['loss']:.4g}, gradient norm"
                f" {grad_norm:.4g}; begin another run with a lower schedule.lr"
            )
        self.optimizer.step(learning_rate(train, self.step, seen))
        self.optimizer.zero_grad()
        experts = self.network.decoder.config.n_routed_experts
        counts = {routing.layer_index: expert_counts(routing.indices_NK, experts) for routing in part.routing}
        for layer_index, bias in self.network.decoder.gate_biases():
            if layer_index in counts:
                update_gate_bias_(bias, counts[layer_index], bias_speed(train, seen))
        if train.ema.decay:
            update_average_(self.average, self.network, train.ema.decay)
        self.step += 1
        self.train_s = time.perf_counter() - self._began
        return events.StepMetrics(
            step=self.step,
            tokens=seen + bars,
            values=values,
            lr=learning_rate(train, self.step - 1, seen),
            grad_norm=grad_norm,
            tokens_per_s=bars / (time.perf_counter() - began),
            max_vio=max((max_violation(counted) for counted in counts.values()), default=0.0),
            batch_size=train.batch_size,
            epoch=0,
            train_s=self.train_s,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def save(self) -> None:
        """A checkpoint of this step, unless it has one."""
        if self.saved_step == self.step:
            return
        self.metrics.sync()
        moments = {f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        moments |= {f"{EMA_PREFIX}{name}": tensor for name, tensor in self.average.items()}
        stored = {"step": self.step, "train_s": self.train_s}

        def write(folder: Path) -> None:
            write_network(folder, self.network)
            write_trainer_state(folder, {name: tensor.contiguous() for name, tensor in moments.items()}, stored)

        began = time.perf_counter()
        path = write_checkpoint(self.run_dir, self.step, write)
        keep_newest(self.run_dir, self.recipe.train.keep_checkpoints)
        self.saved_step = self.step
        self.on_event(events.Saved(self.step, path, time.perf_counter() - began))

    def _restore(self, folder: Path) -> None:
        tensors, state = read_trainer_state(folder)
        moments = {name[len(_OPTIMIZER) :]: t for name, t in tensors.items() if name.startswith(_OPTIMIZER)}
        load_optimizer_tensors(self.optimizer, moments)
        self.average = {name[len(EMA_PREFIX) :]: t for name, t in tensors.items() if name.startswith(EMA_PREFIX)}
        self.step, self.train_s = state["step"], state["train_s"]

    def _started(self) -> events.Started:
        train, config = self.recipe.train, self.network.decoder.config
        flops = training_flops_per_token(config, train.seq_len) + mtp_training_flops_per_token(config, train.seq_len)
        return events.Started(
            run_dir=self.run_dir,
            step=self.step,
            tokens=self.step * train.batch_size * train.seq_len,
            total_steps=self.total_steps,
            total_tokens=self.total_steps * train.batch_size * train.seq_len,
            parameters=sum(parameter.numel() for parameter in self.network.parameters()),
            flops_per_token=flops,
            device="cpu",
            dtype="fp32",
            threads=train.threads,
        )


def _with_choices(recipe: MarketRecipe, run_dir: Path) -> MarketRecipe:
    """Open choices made; in the folder of a run, as that run made them. Raises UserError for another recipe's."""
    if (run_dir / RECIPE).is_file():
        stored = load_market_recipe(run_dir)
        if differences := stored.differences(recipe):
            raise UserError(
                f"{run_dir} holds a run of another recipe: {'; '.join(differences)}; use the first command's settings"
                " to go on with it, or give another folder"
            )
        recipe = replace(recipe, train=take_stored_choices(recipe.train, stored.train))
    chosen = {"device": "cpu", "dtype": "fp32", "threads": recipe.train.threads or torch.get_num_threads()}
    return replace(recipe, train=recipe.train.model_copy(update=chosen))


def _record(panel: Panel, fold: Fold, recipe: MarketRecipe, lessons: BarLessons | TokenLessons) -> dict[str, Any]:
    """What the model was made from, kept beside it: spans, data, and whose statistics scale its inputs."""
    dates = panel.dates
    return {
        "source": panel.origin.source,
        "universe": panel.origin.universe,
        "learned": {
            "from": str(dates[fold.train.start]),
            "to": str(dates[fold.train.stop - 1]),
            "labels_end": str(dates[min(fold.known_until, len(dates)) - 1]),
            "purge": fold.purge,
            "embargo": fold.embargo,
            "sha256": lessons.sha256(),
        },
        "tested": {"from": str(dates[fold.test.start]), "to": str(dates[fold.test.stop - 1])},
        "scaler": {"from": lessons.scaler_span[0], "to": lessons.scaler_span[1]},
        "inputs": list(lessons.input_names),
        "torch": torch.__version__,
    }


def _check_folder(run_dir: Path, record: dict[str, Any]) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{run_dir}: a file is there; give a new folder for the run")
    if (run_dir / FOLD).is_file():
        stored = read_record(run_dir)
        for key in ("source", "learned", "inputs"):
            if stored.get(key) != record[key]:
                raise UserError(
                    f"{run_dir} holds a model of other data or another fold: {key} {stored.get(key)} there,"
                    f" {record[key]} here; give another folder"
                )
        return
    others = [path.name for path in run_dir.iterdir() if not path.name.startswith(".")] if run_dir.exists() else []
    if others and others != [RECIPE]:
        raise UserError(f"{run_dir} has {others[0]} in it but no {FOLD}: no run to go on with; give a new folder")
