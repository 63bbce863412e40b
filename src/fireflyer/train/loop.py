"""The one training loop: a recipe and a folder in; out, a run that may be killed anywhere and goes on exactly.

A step: the global batch in micro-batches (their losses add up to the batch's), gradients clipped together, the
optimizer, then the gate biases by the whole batch's expert counts (report 2.1.2), the average, and a line of metrics.
On a CPU the same recipe and threads give the same bits, however often the run was interrupted.

Of several ranks each does its share of every batch; what they have to agree on goes through `RunState.ranks`
(parallel/ranks.py), which for a process alone does nothing. The first rank alone writes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from fireflyer.checkpoint.run import discard_newer
from fireflyer.checkpoint.run_folder import RunLock, read_metrics, writing
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.errors import RankLost, Stopped, UserError
from fireflyer.model.decoder import compile_trunk
from fireflyer.model.routing import expert_counts, max_violation, update_gate_bias_
from fireflyer.parallel.ranks import Alone, Ranks, lost
from fireflyer.train import events
from fireflyer.train.average import update_average_
from fireflyer.train.events import Event, StepMetrics
from fireflyer.train.monitor import (
    LossMonitor,
    first_non_finite,
    is_finite,
    largest_gradient,
    non_finite_weights,
    save_failure,
)
from fireflyer.train.objective import Evaluation
from fireflyer.train.optimizer import clip_gradients
from fireflyer.train.ranks import check_agreement, join_ranks
from fireflyer.train.run_files import RunFiles
from fireflyer.train.schedule import batch_size_at, bias_speed, learning_rate, run_steps, run_tokens
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import (
    Inputs,
    InputsOpener,
    RunState,
    check_folder,
    lay_out,
    open_inputs,
    open_state,
)
from fireflyer.train.snapshot import take_snapshot
from fireflyer.train.summary import RECENT_STEPS, Summary, finished_summary, peak_memory_bytes, write_summary
from fireflyer.train.threads import use_threads

T = TypeVar("T")

EXPERT_ROWS = 200
"""How often, in a whole run, the load of every expert is written down."""


def train(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    opener: InputsOpener | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Summary:
    """Begin a run, go on with it, or find it finished. Nothing is written before all that was given is checked.

    Args:
        run_dir: a new folder, or that of a run of the same recipe.
        opener: reads and checks what the run learns from; default pretraining's, `setup.open_inputs`.
        on_event: told what happens, see events.py.
        should_stop: asked after every step; once true, the run saves itself and raises Stopped.

    Raises:
        UserError: something the user can mend, data, disk and a diverged run included.
        Stopped: saved; the same call goes on.
    """
    run_dir = Path(run_dir)
    recipe, ranks = join_ranks(recipe)
    try:
        return _train(recipe, run_dir, ranks, opener or open_inputs, on_event, should_stop)
    except RuntimeError as error:
        if isinstance(ranks, Alone) or not lost(error):
            raise
        reason = str(error).partition("\n")[0]
        raise RankLost(
            f"{run_dir}: another rank is gone ({reason}); the same command goes on from the last save"
        ) from error
    finally:
        ranks.close()


def _train(
    recipe: Recipe,
    run_dir: Path,
    ranks: Ranks,
    opener: InputsOpener,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> Summary:
    stored = ranks.each(lambda: check_folder(recipe, run_dir))
    if stored is not None and (summary := finished_summary(run_dir, recipe)) is not None:
        on_event(events.Finished(run_dir, summary.step, already=True))
        return summary
    inputs = ranks.each(lambda: opener(recipe, run_dir, stored, on_event))
    if inputs.alone and not isinstance(ranks, Alone):
        raise UserError("this kind of training runs in one process as yet; leave the launcher out")

    def take_lock() -> RunLock:
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        return RunLock(run_dir)

    def begin() -> None:
        check_folder(recipe, run_dir)  # again, since another process may have begun a run meanwhile
        lay_out(inputs, run_dir)

    with ExitStack() as stack:
        stack.enter_context(use_threads(inputs.recipe.threads))
        lock = ranks.on_first(take_lock)
        if lock is not None:
            stack.enter_context(lock)
        ranks.on_first(begin)
        state = ranks.each(lambda: open_state(inputs, run_dir, on_event, ranks))
        check_agreement(inputs, state, run_dir)
        ranks.on_first(lambda: discard_newer(run_dir, state.step))
        return Trainer(inputs, state, run_dir, on_event).run(recipe, should_stop)


@dataclass
class BatchResult:
    """What the forward and backward passes of one global batch came to."""

    values: dict[str, float]
    """The step's metrics of the objective, `loss` among them."""
    counts: dict[int, Tensor]
    """By MoE layer: (E,) how many of the batch's tokens chose each expert."""


class Trainer:
    """One run in progress: `state` and where it is written. With several ranks, every rank calls every method."""

    def __init__(self, inputs: Inputs, state: RunState, run_dir: Path, on_event: Callable[[Event], None]) -> None:
        self.recipe = inputs.recipe
        self.state = state
        self.run_dir = run_dir
        self.on_event = on_event
        self.ranks = state.ranks
        self.total_steps = run_steps(self.recipe)
        self.parameters = list(state.model.parameters())
        self.trunk = compile_trunk(state.model) if self.recipe.compile else state.model.trunk
        self.files = self.ranks.on_first(lambda: RunFiles(run_dir, self.recipe, state.step))
        history = self.ranks.from_first(read_metrics(run_dir) if self.files is not None else [])
        self.recent = deque(history, maxlen=RECENT_STEPS)
        self.monitor = LossMonitor(state.model.config.vocab_size, (row["loss"] for row in history))
        self.saved_step = state.step
        self._counts: dict[int, Tensor] = {}
        self._began = time.perf_counter() - state.train_s

    def run(self, asked: Recipe, should_stop: Callable[[], bool]) -> Summary:
        """Steps until the end; `asked` is the recipe as the command gave it."""
        self.on_event(self._started())
        try:
            while self.state.step < self.total_steps:
                self._step_with_bookkeeping()
                if self.ranks.any(should_stop()) and self.state.step < self.total_steps:
                    self.save()
                    self._tell_saved(wait=True)
                    raise Stopped(
                        f"{self.run_dir}: stopped and saved at step {self.state.step} of {self.total_steps};"
                        " the same command goes on"
                    )
            self.save()
            self._tell_saved(wait=True)
            summary = self._summary(asked)
            self.ranks.on_first(lambda: write_summary(self.run_dir, summary))
            base = self.recipe.init_from if self.recipe.lora is not None else None
            self.on_event(events.Finished(self.run_dir, self.state.step, already=False, adapts=base))
            return summary
        finally:
            self.close()

    def step(self) -> StepMetrics:
        """One optimizer step on the next global batch."""
        state, recipe = self.state, self.recipe
        began = time.perf_counter()
        lr = learning_rate(recipe, state.step, state.tokens)
        speed = bias_speed(recipe, state.tokens)
        batch = state.objective.next_batch(batch_size_at(recipe, state.tokens))
        rows, tokens = state.objective.size(batch)
        result = self.forward_backward(batch)
        grad_norm = clip_gradients(self.parameters, recipe.optimizer.grad_clip, self.ranks)
        self._check(batch, result, grad_norm)
        state.optimizer.step(lr)
        self.ranks.updated()
        state.optimizer.zero_grad()
        for layer_index, bias in state.model.gate_biases():
            if layer_index in result.counts:
                update_gate_bias_(bias, result.counts[layer_index], speed)
        self._counts = result.counts
        if recipe.ema.decay:
            update_average_(state.average, state.model, recipe.ema.decay, self.ranks)
        state.step += 1
        state.tokens += tokens
        state.train_s = time.perf_counter() - self._began
        return StepMetrics(
            step=state.step,
            tokens=state.tokens,
            values=result.values,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_s=tokens / (time.perf_counter() - began),
            max_vio=max((max_violation(counts) for counts in result.counts.values()), default=0.0),
            batch_size=rows,
            epoch=state.objective.epoch,
            train_s=state.train_s,
            peak_memory_bytes=peak_memory_bytes(),
        )

    def forward_backward(self, batch: Any) -> BatchResult:
        """Accumulate the gradients of one global batch, part by part; what it came to is the whole batch's."""
        model, objective, ranks = self.state.model, self.state.objective, self.ranks
        sums: dict[str, Tensor] = {}
        counts: dict[int, Tensor] = {}
        for part in objective.parts(batch, self.trunk, self.state.tokens):
            if part.loss.requires_grad:  # a pipeline has taken it already
                ranks.before_backward(model, part.last)
                part.loss.backward()
            for name, value in part.values.items():
                sums[name] = sums.get(name, 0.0) + value.detach().to("cpu", torch.float64)
            for routing in part.routing:
                chosen = expert_counts(routing.indices_NK, model.config.n_routed_experts)
                counts[routing.layer_index] = counts.get(routing.layer_index, torch.zeros_like(chosen)) + chosen
        values = objective.metrics(batch, ranks.summed({name: float(value) for name, value in sums.items()}))
        return BatchResult(values, ranks.counted(counts))

    def evaluate(self) -> Evaluation | None:
        """Score what is held out; changes nothing."""
        began = time.perf_counter()
        scored = self.state.objective.evaluate()
        self.ranks.settle(self.state.model)
        if scored is not None:
            self.on_event(events.Evaluated(self.state.step, scored.values, time.perf_counter() - began))
        return scored

    def save(self) -> None:
        """Begin a checkpoint of this step, unless it has one."""
        state = self.state
        if self.saved_step == state.step:
            return
        stored = {
            "step": state.step,
            "tokens": state.tokens,
            "train_s": state.train_s,
            "data": state.objective.state_dict(),
        }
        if state.base_sha256 is not None:
            stored["base_sha256"] = state.base_sha256
        lora, base = self.recipe.lora, self.recipe.init_from
        adapter = None if lora is None or base is None else (lora.alpha, base)
        snapshot = take_snapshot(state.model, state.optimizer, state.average, stored, self.run_dir, adapter, self.ranks)
        self._with_files(lambda files: files.save(state.step, snapshot))
        self.saved_step = state.step

    def close(self) -> None:
        """Wait for a save in flight and close the files; raises nothing, so that it hides no error."""
        if self.files is not None:
            self.files.close()

    def _step_with_bookkeeping(self) -> None:
        state, recipe = self.state, self.recipe
        epoch = state.objective.epoch
        metrics = self.step()
        row = metrics.row()
        last = state.step == self.total_steps
        samples: list[dict[str, Any]] = []
        if recipe.eval_every and (last or state.step % recipe.eval_every == 0):
            scored = self.evaluate()
            if scored is not None:
                row |= scored.values
                samples = scored.samples
        experts = None
        if self._counts and (last or state.step % max(1, self.total_steps // EXPERT_ROWS) == 0):
            biases = self.ranks.of_all_layers(dict(state.model.gate_biases()))
            experts = expert_row(self._counts, sorted(biases.items()))
        self._with_files(lambda files: files.log(row, samples, experts))
        self.recent.append(row)
        if metrics.epoch > epoch:
            self.on_event(events.Notice(f"the data begins again, reshuffled: epoch {metrics.epoch + 1}"))
        if last or state.step % recipe.log_every == 0:
            self.on_event(events.StepDone(metrics, self.total_steps))
        if state.step % recipe.checkpoint_every == 0:
            self.save()
        self._tell_saved()

    def _with_files(self, do: Callable[[RunFiles], T]) -> T | None:
        """On the first rank, which has them open; its errors are everybody's."""
        files = self.files
        return self.ranks.on_first(lambda: None if files is None else do(files))

    def _check(self, batch: Any, result: BatchResult, grad_norm: float) -> None:
        """Stop the run where monitor.py's rule says so. Nothing of this step has changed a weight yet."""
        step = self.state.step + 1
        loss, model, ranks = result.values["loss"], self.state.model, self.ranks
        if not is_finite(*result.values.values(), grad_norm):
            reason = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
            layer = ranks.told(non_finite_weights(model, ranks))
            layer = layer or ranks.from_first(first_non_finite(model, lambda: self._rerun(batch), ranks))
        elif self.state.objective.watches_loss and (wrong := self.monitor.see(loss)):
            reason, layer = wrong, ranks.from_first(largest_gradient(model, ranks))
        else:
            return
        tensors = self.state.objective.tensors(batch)
        kept = ranks.told(ranks.on_first(lambda: save_failure(self.run_dir, step, tensors, reason, layer)))
        raise UserError(
            f"{self.run_dir}: training failed at step {step}: {reason}; first seen in {layer}; the batch is in {kept}."
            " Begin another run with a lower schedule.lr, or from an earlier checkpoint with --from"
        )

    def _rerun(self, batch: Any) -> None:
        self.trunk = self.state.model.trunk  # uncompiled, so that hooks see every module
        self.state.optimizer.zero_grad()
        self.forward_backward(batch)

    def _tell_saved(self, *, wait: bool = False) -> None:
        for saved in self._with_files(lambda files: files.saved(wait=wait)) or []:
            self.on_event(events.Saved(saved.step, saved.path, saved.seconds))

    def _flops_per_token(self) -> float:
        config, seq_len = self.state.model.config, self.recipe.batch_ramp.mean_seq_len
        return training_flops_per_token(config, seq_len) + mtp_training_flops_per_token(config, seq_len)

    def _started(self) -> events.Started:
        counts = count_parameters(self.state.model.config)
        return events.Started(
            run_dir=self.run_dir,
            step=self.state.step,
            tokens=self.state.tokens,
            total_steps=self.total_steps,
            total_tokens=run_tokens(self.recipe),
            parameters=counts.total + counts.mtp,
            flops_per_token=self._flops_per_token(),
            device=self.recipe.device,
            dtype=self.recipe.dtype,
            threads=self.recipe.threads,
        )

    def _summary(self, asked: Recipe) -> Summary:
        last = self.recent[-1] if self.recent else {}  # someone may have removed the metrics
        counts = count_parameters(self.state.model.config)
        return Summary(
            step=self.state.step,
            tokens=self.state.tokens,
            loss=self._recent_mean("loss"),
            mtp_loss=self._recent_mean("mtp_loss"),
            balance_loss=self._recent_mean("balance_loss"),
            max_vio=self._recent_mean("max_vio"),
            tokens_per_s=self._recent_mean("tokens_per_s"),
            eval_loss=last.get("eval_loss"),
            bits_per_byte=last.get("bits_per_byte"),
            train_s=self.state.train_s,
            flops=self._flops_per_token() * self.state.tokens,
            parameters=counts.total + counts.mtp,
            peak_memory_bytes=peak_memory_bytes(),
            checkpoint=f"checkpoints/step-{self.state.step:08d}",
            steps_asked=asked.steps,
            tokens_asked=asked.tokens,
            epochs_asked=asked.epochs,
        )

    def _recent_mean(self, key: str) -> float | None:
        values = [row[key] for row in self.recent if key in row]
        return fmean(values) if values else None


def expert_row(counts: dict[int, Tensor], gate_biases: list[tuple[int, Tensor]]) -> dict[str, dict[str, list[float]]]:
    """A line of experts.jsonl: by layer the load of each expert over an even share, and its gate bias."""
    shares = {layer: counted.double() * (len(counted) / int(counted.sum())) for layer, counted in counts.items()}
    return {
        "load": {str(layer): [round(x, 3) for x in share.tolist()] for layer, share in shares.items()},
        "bias": {str(layer): [round(x, 5) for x in bias.tolist()] for layer, bias in gate_biases},
    }
