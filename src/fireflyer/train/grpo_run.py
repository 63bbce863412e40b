"""GRPO as an objective of the one loop (report 5.2.2): what is opened and checked before a run, and its steps.

In: a recipe with [grpo] and `init_from`. Out: `Inputs`. Each step is one update on answers that the model in training
gave; its row of metrics.jsonl tells of rewards, of the policy's movement and of where the time went.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fireflyer.checkpoint.hf import load_model
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.checkpoint.run_folder import SAMPLES, TOKENIZER, MetricsLog
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.environments import Environment, open_environment
from fireflyer.train.events import Event, Notice
from fireflyer.train.grpo import GrpoSource, Reference
from fireflyer.train.objective import Evaluation, Part, Trunk
from fireflyer.train.policy_batch import PolicyBatch
from fireflyer.train.policy_update import answer_logprobs, policy_part
from fireflyer.train.post_training_settings import GrpoSettings
from fireflyer.train.precision import autocast
from fireflyer.train.prompts import PromptForm, check_problems, prompt_form
from fireflyer.train.recipe import take_stored_choices
from fireflyer.train.rewards import judge
from fireflyer.train.rollout import Rollouts
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import Inputs, check_tables, choose

_REFERENCE_ROWS = 64


class Grpo:
    """An `Objective`: fresh answers of the model, and GRPO's loss on them."""

    watches_loss = False

    def __init__(
        self,
        recipe: Recipe,
        model: Decoder,
        environment: Environment,
        prompts: PromptForm,
        run_dir: Path,
        on_event: Callable[[Event], None],
        reference: Reference | None,
    ) -> None:
        settings = grpo_settings(recipe)
        self._settings = settings
        self._recipe, self._model, self._environment, self._prompts = recipe, model, environment, prompts
        self._rollouts = Rollouts(
            model,
            prompts.tokenizer,
            max_length=recipe.seq_len,
            at_once=settings.answers_at_once,
            record_experts=settings.routing_replay,
        )
        self._run_dir = run_dir
        self.source = GrpoSource(
            settings,
            self._rollouts,
            environment,
            prompts,
            seed=recipe.seed,
            pad_id=pad_id(prompts.tokenizer),
            held_out=held_out(recipe),
            on_samples=self._keep,
            on_notice=lambda text: on_event(Notice(text)),
            reference=reference,
        )
        self._updates = 0
        self._update_began = self._gap_max = 0.0

    @property
    def epoch(self) -> int:
        return self.source.epoch

    def next_batch(self, batch_size: int) -> PolicyBatch:
        batch = self.source.next_batch(batch_size)  # may write samples, of the step that begins
        self._update_began, self._gap_max = time.perf_counter(), 0.0
        self._updates += 1
        return batch

    def size(self, batch: PolicyBatch) -> tuple[int, int]:
        # Schedules run by tokens: each row counts as the longest it may be, so that they end with the steps.
        return batch.num_rows, batch.num_rows * self._recipe.seq_len

    def parts(self, batch: PolicyBatch, trunk: Trunk, tokens: int) -> Iterator[Part]:
        recipe = self._recipe
        trunk = partial(trunk, recompute=recipe.parallel.recompute)
        for rows in batch.parts(recipe.parallel.micro_batch_size or batch.num_rows, recipe.device):
            with autocast(recipe):
                part = policy_part(trunk, self._model, rows, self._settings)
            terms = part.terms
            self._gap_max = max(self._gap_max, float(terms.gap_max))
            values = {"loss": terms.loss, "kl": terms.kl, "clip_share": terms.clipped, "gap": terms.gap}
            yield Part(terms.loss, {**values, "entropy": part.entropy}, part.routing)

    def metrics(self, batch: PolicyBatch, sums: dict[str, float]) -> dict[str, float]:
        assert self.source.metrics is not None
        tokens = max(batch.num_answer_tokens, 1)
        means = {name: sums[name] / tokens for name in ("kl", "entropy", "clip_share", "gap")}
        rollouts = asdict(self.source.metrics)
        if not self.source.fresh:  # their time was the first update's
            rollouts |= {"rollout_s": 0.0, "scoring_s": 0.0}
        update_s = time.perf_counter() - self._update_began
        return {"loss": sums["loss"], **means, "gap_max": self._gap_max, **rollouts, "update_s": update_s}

    def tensors(self, batch: PolicyBatch) -> dict[str, Tensor]:
        return {
            "input_ids": batch.input_ids_BT,
            "labels": batch.labels_BT,
            "old_logprobs": batch.old_logprobs_BT,
            "advantages": batch.advantages_BT,
        }

    def evaluate(self) -> Evaluation | None:
        """The greedy answer to each held-out problem."""
        count = held_out(self._recipe)
        if not count:
            return None
        return Evaluation(examine(self._rollouts, self._environment, self._prompts, range(count)))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, **self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._updates = state["updates"]
        self.source.load_state_dict(state)

    def _keep(self, samples: list[dict[str, Any]]) -> None:
        """Into samples.jsonl, beside the lines that the loop itself adds at its end."""
        log = MetricsLog(self._run_dir, resume_step=self._updates, name=SAMPLES)
        for sample in samples:
            log.append({"step": self._updates + 1, **sample})
        log.close()


def examine(
    rollouts: Rollouts, environment: Environment, prompts: PromptForm, numbers: Sequence[int]
) -> dict[str, float]:
    """How many of these problems the model's greedy answers get right."""
    problems = [environment.problem(number) for number in numbers]
    encoded = [prompts.encode(problem.prompt, problem.where) for problem in problems]
    answers = rollouts.best_answers([ids for _, ids in encoded], max_tokens=prompts.max_answer_tokens)
    replies = [(p, text, a.text, a.ended) for p, (text, _), a in zip(problems, encoded, answers, strict=True)]
    rewards = judge(environment, replies, answer_weight=1.0, format_weight=0.0)
    return {
        "eval_accuracy": fmean(reward.correct for reward in rewards),
        "eval_format": fmean(reward.format for reward in rewards),
        "eval_length": fmean(len(answer.token_ids) for answer in answers),
    }


def held_out(recipe: Recipe) -> int:
    """Problems kept for evaluation: none where there is none."""
    return grpo_settings(recipe).held_out if recipe.eval_every else 0


def grpo_settings(recipe: Recipe) -> GrpoSettings:
    """[grpo], or its defaults."""
    return recipe.grpo or GrpoSettings()


def pad_id(tokenizer: Tokenizer) -> int:
    """What fills rows; nothing reads it."""
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def open_grpo(recipe: Recipe, run_dir: Path, stored: Recipe | None, on_event: Callable[[Event], None]) -> Inputs:
    """Everything a GRPO run reads, checked; writes nothing. Raises UserError."""
    recipe = choose(recipe if stored is None else take_stored_choices(recipe, stored))
    _check(recipe)
    assert recipe.init_from is not None
    if (run_dir / TOKENIZER).is_file():
        tokenizer = Tokenizer.from_file(run_dir / TOKENIZER)
    else:
        assert recipe.data.tokenizer is not None, "a recipe with init_from has a tokenizer"
        tokenizer = Tokenizer.from_file(recipe.data.tokenizer)
    settings = grpo_settings(recipe)
    prompts = prompt_form(settings, tokenizer, recipe.seq_len)
    environment = open_environment(settings, recipe.seed)
    check_problems(environment, prompts, held_out(recipe), settings.table)

    def objective(model: Decoder) -> Grpo:
        return Grpo(recipe, model, environment, prompts, run_dir, on_event, _reference(recipe, tokenizer))

    return Inputs(recipe, tokenizer, objective)


def _check(recipe: Recipe) -> None:
    settings = grpo_settings(recipe)
    if recipe.init_from is None:
        raise UserError("reinforcement learning begins from a model: give --from CHECKPOINT")
    open_checkpoint(recipe.init_from)
    if recipe.steps is None and recipe.tokens is None:
        raise UserError("epochs don't tell how long a GRPO run is; give its length as --set steps=N")
    answers = recipe.batch_size * settings.updates
    if answers % settings.group_size:
        raise UserError(
            f"batch_size = {recipe.batch_size} times grpo.updates = {settings.updates} is {answers} answers, which"
            f" grpo.group_size = {settings.group_size} does not divide; make it a multiple"
        )
    if recipe.schedule.batch_start is not None:
        raise UserError("schedule.batch_start: the batch of a GRPO run stays as it is; leave it out")
    check_tables(recipe, "grpo", "grpo")
    for key, value in (("mtp.weight", recipe.mtp.weight), ("balance.sequence_alpha", recipe.balance.sequence_alpha)):
        if value:
            raise UserError(f"{key} = {value}: GRPO has no such loss; set it to 0")
    if settings.routing_replay and not recipe.model.n_routed_experts:
        raise UserError("grpo.routing_replay = true: this model has no routed experts; leave it out")


def _reference(recipe: Recipe, tokenizer: Tokenizer) -> Reference | None:
    if not grpo_settings(recipe).kl_weight:
        return None
    assert recipe.init_from is not None
    model = load_model(recipe.init_from, dtype=torch.float32, device=recipe.device)
    model.requires_grad_(False)
    rows = recipe.parallel.micro_batch_size or _REFERENCE_ROWS
    return partial(answer_logprobs, model, rows=rows, pad_id=pad_id(tokenizer))
