"""What a teacher answers: problems in; out, a file of all its answers with what each was worth, chunk by chunk.

A chunk is what is answered at the same time. One that was not written whole is answered again, and since nothing but
the problems' numbers and the seed decides what is drawn, a gathering that was stopped or killed ends in the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fireflyer.checkpoint.run_folder import MetricsLog, read_metrics
from fireflyer.data.draws import permutation, words
from fireflyer.errors import UserError
from fireflyer.infer.llm import LLM
from fireflyer.infer.outputs import CompletionOutput
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.text.special_tokens import THINK_BEGIN
from fireflyer.train.environments import Environment
from fireflyer.train.judges import Problem
from fireflyer.train.post_training_settings import DistillSettings
from fireflyer.train.prompts import PromptForm
from fireflyer.train.rewards import Reward, judge
from fireflyer.train.rollout import finish

ANSWERS = "answers.jsonl"

Verdict = Literal["right", "wrong", "cut_off", "not_graded"]


@dataclass(frozen=True)
class Answer:
    """One answer as ANSWERS has it. `text` begins with the thought's mark where the prompt had set it already.

    reward: the grader's. token_ids: as they were drawn, of right answers that the student can take as they are; None.
    """

    text: str
    reward: float
    verdict: Verdict
    note: str
    token_ids: list[int] | None


@dataclass(frozen=True)
class Asked:
    """A problem and its answers: none where it was too long to be put."""

    number: int
    problem: str
    answers: list[Answer]


@dataclass(frozen=True)
class Gathered:
    """How far the gathering is: problems of `total`, answers to them, how many are right; speed of the last chunk."""

    problems: int
    total: int
    answers: int
    right: int
    tokens_per_s: float | None


def problem_numbers(settings: DistillSettings, environment: Environment, seed: int) -> list[int]:
    """Which problems are asked, of those not held out: of a file some drawn by the seed, without end the first."""
    held_out = settings.held_out
    if environment.num_problems is None:
        return list(range(held_out, held_out + settings.problems))
    order = permutation(environment.num_problems - held_out, seed, "asked")
    return [held_out + int(place) for place in order[: settings.problems]]


class Gathering:
    """The answers in a run's folder, and those still to be asked for. `numbers`: of the problems, in order."""

    def __init__(
        self, run_dir: Path, environment: Environment, settings: DistillSettings, numbers: Sequence[int], seed: int
    ) -> None:
        self._run_dir, self._environment, self._settings = run_dir, environment, settings
        self._numbers, self._seed = numbers, seed
        self._chunk = max(1, settings.answers_at_once // settings.samples)
        rows = read_metrics(run_dir, name=ANSWERS)
        self._chunks_done = len(rows) // self._chunk if len(rows) < len(numbers) else -(-len(numbers) // self._chunk)
        self.asked = [_asked(row) for row in rows[: self._chunks_done * self._chunk]]
        self.total = len(numbers)

    @property
    def complete(self) -> bool:
        return len(self.asked) == self.total

    def run(
        self,
        teacher: LLM,
        prompts: PromptForm,
        *,
        with_ids: bool,
        on_event: Callable[[Gathered], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Ask what is left. with_ids: whether the student takes the token ids as they are.

        Raises Stopped at once where `should_stop` says so: the chunk in progress is lost.
        """
        log = MetricsLog(self._run_dir, resume_step=self._chunks_done, name=ANSWERS)
        try:
            on_event(self._event(None))
            while not self.complete:
                began = time.perf_counter()
                asked, tokens = self._ask(teacher, prompts, with_ids, should_stop)
                self._chunks_done += 1
                for one in asked:
                    log.append({"step": self._chunks_done, **asdict(one)})
                log.sync()
                self.asked += asked
                on_event(self._event(tokens / (time.perf_counter() - began)))
        finally:
            log.close()

    def _event(self, tokens_per_s: float | None) -> Gathered:
        answers = [answer for one in self.asked for answer in one.answers]
        right = sum(answer.verdict == "right" for answer in answers)
        return Gathered(len(self.asked), len(self._numbers), len(answers), right, tokens_per_s)

    def _ask(
        self, teacher: LLM, prompts: PromptForm, with_ids: bool, should_stop: Callable[[], bool]
    ) -> tuple[list[Asked], int]:
        """The next chunk, and how many tokens it took."""
        start = len(self.asked)
        problems = {n: self._environment.problem(n) for n in self._numbers[start : start + self._chunk]}
        put = {n: encoded for n, problem in problems.items() if (encoded := self._encoded(prompts, problem))}
        requests = {n: teacher.make_request(ids, self._params(n)) for n, (_, ids) in put.items()}
        finish(teacher, list(requests.values()), should_stop)
        outputs = {n: request.output().outputs for n, request in requests.items()}
        replies = [
            (problems[n], put[n][0], output.text, output.finish_reason == "stop") for n in put for output in outputs[n]
        ]
        rewards = iter(judge(self._environment, replies, answer_weight=1.0, format_weight=0.0))
        answers = {
            n: [self._answer(output, next(rewards), prompt, with_ids) for output in outputs[n]]
            for n, (prompt, _) in put.items()
        }
        asked = [Asked(n, problem.prompt, answers.get(n, [])) for n, problem in problems.items()]
        return asked, sum(len(output.token_ids) for own in outputs.values() for output in own)

    def _params(self, number: int) -> SamplingParams:
        settings = self._settings
        return SamplingParams(
            n=settings.samples,
            max_tokens=settings.max_answer_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=words(self._seed, "teacher", number)[0],
        )

    def _encoded(self, prompts: PromptForm, problem: Problem) -> tuple[str, list[int]] | None:
        """None for one of problems without end that is too long."""
        try:
            return prompts.encode(problem.prompt, problem.where)
        except UserError:
            if self._environment.num_problems is not None:
                raise
            return None

    def _answer(self, output: CompletionOutput, reward: Reward, prompt: str, with_ids: bool) -> Answer:
        least = self._settings.min_reward
        verdict: Verdict = "right" if (reward.correct if least is None else reward.answer >= least) else "wrong"
        if not reward.graded:
            verdict = "not_graded"
        if output.finish_reason != "stop":
            verdict = "cut_off"
        opening = THINK_BEGIN if prompt.rstrip().endswith(THINK_BEGIN) else ""
        ids = output.token_ids if with_ids and verdict == "right" else None
        return Answer(opening + output.text, reward.answer, verdict, reward.note, ids)


def _asked(row: dict[str, Any]) -> Asked:
    return Asked(row["number"], row["problem"], [Answer(**answer) for answer in row["answers"]])
