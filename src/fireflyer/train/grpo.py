"""GRPO's batches: problems are drawn, answered by the model in training, graded, compared within their groups.

In: an environment and the engine around the model. Out: `PolicyBatch`es, and beside them what their rollouts came to.
One set of rollouts gives `grpo.updates` batches; those not taken yet are part of the state, so that a run stopped
between them goes on with the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch

from fireflyer.data.draws import permutation, words
from fireflyer.errors import UserError
from fireflyer.train.advantages import equal_groups, group_advantages
from fireflyer.train.environments import Environment
from fireflyer.train.judges import Problem
from fireflyer.train.policy_batch import PolicyBatch, Trial, collate
from fireflyer.train.post_training_settings import GrpoSettings
from fireflyer.train.prompts import PromptForm
from fireflyer.train.rewards import Reward, judge
from fireflyer.train.rollout import Rollout, Rollouts

Reference = Callable[[Sequence[tuple[list[int], list[int]]]], list[list[float]]]
"""(prompt, answer) ids in; log-probabilities of the answers' tokens by the reference model out."""

_TOO_LONG_IN_A_ROW = 100
_TELL_AGAIN = 10
"""Sets of rollouts without anything to learn after which it is said once more."""


@dataclass(frozen=True)
class RolloutMetrics:
    """Means over the answers of one set of rollouts, as metrics.jsonl has them.

    reward is the weighted sum; accuracy the share that is right; truncated that was cut off; equal_groups the share of
    groups in which all rewards are alike; failed_grades counts answers whose grader failed.
    """

    reward: float
    accuracy: float
    format_reward: float
    answer_reward: float
    length: float
    truncated: float
    equal_groups: float
    failed_grades: int
    rollout_s: float
    scoring_s: float
    rollout_tokens_per_s: float


@dataclass(frozen=True)
class _Group:
    """One problem with its answers and what each was worth."""

    problem: Problem
    prompt: str
    prompt_ids: list[int]
    rollouts: list[Rollout]
    rewards: list[Reward]


class GrpoSource:
    """Batches of fresh answers, endless. What the training loop calls a source.

    Args:
        seed: of the problems' order and of what is drawn for their answers.
        prompts: from a problem to token ids.
        held_out: the environment's first problems, never drawn.
        on_samples: given a few answers of each set of rollouts, to be read by people.
        on_notice: told where a whole set of rollouts has nothing to teach, and what fails in grading.
        reference: for the KL; None without.
    """

    def __init__(
        self,
        settings: GrpoSettings,
        rollouts: Rollouts,
        environment: Environment,
        prompts: PromptForm,
        *,
        seed: int,
        pad_id: int,
        held_out: int,
        on_samples: Callable[[list[dict[str, Any]]], None],
        on_notice: Callable[[str], None],
        reference: Reference | None = None,
    ) -> None:
        self._settings, self._rollouts, self._environment, self._prompts = settings, rollouts, environment, prompts
        self._seed, self._pad_id, self._reference = seed, pad_id, reference
        self._on_samples, self._on_notice = on_samples, on_notice
        self._num_drawn = self._num_collected = self._dull_in_a_row = 0
        self._held_out = held_out
        count = environment.num_problems
        self._num_problems = None if count is None else count - held_out
        self._pending: list[Trial] = []
        self._order: tuple[int, np.ndarray] | None = None
        self.metrics: RolloutMetrics | None = None
        """Of the set of rollouts that the last batch is from."""
        self.fresh = True
        """Whether the last batch is the first from its rollouts: drawn by the very weights that it updates."""

    @property
    def epoch(self) -> int:
        """Passes over the problems; 0 where they never end."""
        return 0 if self._num_problems is None else self._num_drawn // self._num_problems

    def next_batch(self, batch_size: int) -> PolicyBatch:
        """`batch_size` answers: of the last rollouts while they last, or of new ones."""
        self.fresh = not self._pending
        if self.fresh:
            self._pending = self._collect(batch_size * self._settings.updates)
        taken, self._pending = self._pending[:batch_size], self._pending[batch_size:]
        return collate(
            taken,
            pad_id=self._pad_id,
            length_rule=self._settings.length_rule,
            max_tokens=self._settings.max_answer_tokens,
        )

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; floating-point numbers are kept to the bit."""
        return {
            "environment": self._environment.fingerprint(),
            "drawn": self._num_drawn,
            "collected": self._num_collected,
            "dull_in_a_row": self._dull_in_a_row,
            "pending": [asdict(trial) for trial in self._pending],
            "metrics": None if self.metrics is None else asdict(self.metrics),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken. Raises UserError where the problems are no longer what they were."""
        if state["environment"] != self._environment.fingerprint():
            raise UserError(
                f"{self._environment.name}: its problems changed since this run was saved; put them back or begin"
                " another run"
            )
        self._num_drawn, self._num_collected = state["drawn"], state["collected"]
        self._dull_in_a_row = state["dull_in_a_row"]
        self._pending = [Trial(**trial) for trial in state["pending"]]
        self.metrics = None if state["metrics"] is None else RolloutMetrics(**state["metrics"])

    def _collect(self, num_answers: int) -> list[Trial]:
        settings = self._settings
        began = time.perf_counter()
        asked = [self._ask() for _ in range(num_answers // settings.group_size)]
        problems, prompts = [problem for problem, _ in asked], [prompt for _, prompt in asked]
        seeds = [words(self._seed, "answers", self._num_collected, place)[0] for place in range(len(problems))]
        answered = self._rollouts.answer(
            [ids for _, ids in prompts], seeds, group_size=settings.group_size, max_tokens=settings.max_answer_tokens
        )
        written = time.perf_counter()
        groups = self._judged(problems, prompts, answered)
        scored = time.perf_counter()
        rewards_PG = torch.tensor([[reward.total for reward in group.rewards] for group in groups]).double()
        graded_PG = torch.tensor([[reward.graded for reward in group.rewards] for group in groups])
        equal_P = equal_groups(rewards_PG, graded_PG)
        self.metrics = _metrics(groups, float(equal_P.double().mean()), written - began, scored - written)
        self._tell(groups, bool(equal_P.all()))
        self._num_collected += 1
        self._on_samples(_samples(groups))
        advantages = group_advantages(rewards_PG, graded_PG, by_std=settings.normalize_std).tolist()
        return self._trials(groups, advantages)

    def _ask(self) -> tuple[Problem, tuple[str, list[int]]]:
        """The next problem with its prompt. Of problems without end, those that are too long are passed over."""
        for _ in range(_TOO_LONG_IN_A_ROW):
            problem = self._draw()
            try:
                return problem, self._prompts.encode(problem.prompt, problem.where)
            except UserError:
                if self._num_problems is not None:
                    raise
        raise UserError(
            f"{self._environment.name}: {_TOO_LONG_IN_A_ROW} problems in a row are too long for seq_len; raise it"
        )

    def _draw(self) -> Problem:
        """The next problem: a finite environment's in an order of its own for each pass."""
        count, drawn = self._num_problems, self._num_drawn
        self._num_drawn += 1
        if count is None:
            return self._environment.problem(self._held_out + drawn)
        epoch, place = divmod(drawn, count)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(count, self._seed, "problems", epoch)
        return self._environment.problem(self._held_out + int(self._order[1][place]))

    def _judged(
        self, problems: list[Problem], prompts: list[tuple[str, list[int]]], answered: list[list[Rollout]]
    ) -> list[_Group]:
        flat = [
            (problem, prompt, rollout)
            for problem, (prompt, _), group in zip(problems, prompts, answered, strict=True)
            for rollout in group
        ]
        rewards = judge(
            self._environment,
            [(problem, prompt, rollout.text, rollout.ended) for problem, prompt, rollout in flat],
            answer_weight=self._settings.answer_weight,
            format_weight=self._settings.format_weight,
        )
        size = self._settings.group_size
        return [
            _Group(problem, prompt, ids, group, rewards[place * size : (place + 1) * size])
            for place, (problem, (prompt, ids), group) in enumerate(zip(problems, prompts, answered, strict=True))
        ]

    def _tell(self, groups: list[_Group], all_equal: bool) -> None:
        failed = [reward for group in groups for reward in group.rewards if not reward.graded]
        if failed:
            total = len(groups) * self._settings.group_size
            self._on_notice(f"grading failed for {len(failed)} of {total} answers, left out: {failed[0].note}")
        self._dull_in_a_row = self._dull_in_a_row + 1 if all_equal else 0
        if self._dull_in_a_row % _TELL_AGAIN == 1:
            self._on_notice(_advice(groups))

    def _trials(self, groups: list[_Group], advantages: list[list[float]]) -> list[Trial]:
        settings = self._settings
        pairs = [(group.prompt_ids, rollout.token_ids) for group in groups for rollout in group.rollouts]
        reference = self._reference(pairs) if self._reference is not None else [None] * len(pairs)
        trials = []
        for group, own in zip(groups, advantages, strict=True):
            for rollout, reward, advantage in zip(group.rollouts, group.rewards, own, strict=True):
                counts = reward.graded and (rollout.ended or not settings.mask_truncated)
                trials.append(
                    Trial(
                        group.prompt_ids,
                        rollout.token_ids,
                        rollout.logprobs,
                        advantage,
                        counts,
                        reference[len(trials)],
                        rollout.experts,
                    )
                )
        if settings.updates == 1:
            return trials
        # Each update then sees answers to many problems, and not a few problems' groups.
        order = permutation(len(trials), self._seed, "updates", self._num_collected)
        return [trials[place] for place in order]


def _metrics(groups: list[_Group], equal: float, rollout_s: float, scoring_s: float) -> RolloutMetrics:
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    graded = [reward for reward in rewards if reward.graded]
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return RolloutMetrics(
        reward=fmean(reward.total for reward in graded) if graded else 0.0,
        accuracy=fmean(reward.correct for reward in rewards),
        format_reward=fmean(reward.format for reward in rewards),
        answer_reward=fmean(reward.answer for reward in graded) if graded else 0.0,
        length=tokens / len(rollouts),
        truncated=fmean(not rollout.ended for rollout in rollouts),
        equal_groups=equal,
        failed_grades=len(rewards) - len(graded),
        rollout_s=rollout_s,
        scoring_s=scoring_s,
        rollout_tokens_per_s=tokens / rollout_s,
    )


def _samples(groups: list[_Group]) -> list[dict[str, Any]]:
    """The best and the worst answer to the first problem whose answers differ in worth, or to the first of all."""
    differing = [group for group in groups if len({reward.total for reward in group.rewards}) > 1]
    group = (differing or groups)[0]
    order = sorted(range(len(group.rollouts)), key=lambda i: group.rewards[i].total)
    return [
        {
            "prompt": group.problem.prompt,
            "text": group.rollouts[i].text,
            "reward": group.rewards[i].total,
            "correct": group.rewards[i].correct,
            "note": group.rewards[i].note,
        }
        for i in dict.fromkeys((order[-1], order[0]))
    ]


def _advice(groups: list[_Group]) -> str:
    rewards = [reward for group in groups for reward in group.rewards if reward.graded]
    if not rewards:
        return "no answer could be graded, so there is nothing to learn; look at the environment's grader"
    right = fmean(reward.correct for reward in rewards)
    if right == 1:
        return "every answer to every problem is right: nothing is left to learn here; give harder problems"
    if right == 0:
        return (
            f"no answer to any of {len(groups)} problems is right, and all rewards in each group are alike: nothing can"
            " be learnt; give easier problems, a larger grpo.group_size, or more SFT first"
        )
    return (
        "all rewards in each group are alike: nothing can be learnt; give problems of middling difficulty or a larger"
        " grpo.group_size"
    )
