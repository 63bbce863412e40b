"""The reasoning demo: the demo's model learns to think from easy examples, then harder problems from rewards alone.

In: a folder, and that of a finished demo (made first if absent). Out: two runs, `cold-start` and `grpo`, in it, and
summary.json: held-out accuracy before and after each stage. The same call again goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fireflyer.checkpoint.hf import load_model
from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import SUMMARY, read_metrics, writing
from fireflyer.data.arithmetic import Problem
from fireflyer.demo.carrying import answer, cold_start, easy_examination, examination, harder, question
from fireflyer.errors import Stopped, UserError
from fireflyer.infer.llm import LLM
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.events import Event
from fireflyer.train.grpo_run import open_grpo
from fireflyer.train.loop import train
from fireflyer.train.recipe import load_recipe
from fireflyer.train.rewards import final_answer
from fireflyer.train.sft import open_chats

COLD_START, GRPO = "cold-start", "grpo"
_EXAMPLES = 2000
_PROBLEMS = 2000
_EXAMINED = 500
_WATCHED = 100
"""Held-out problems of the curve; they are not among those of the examination."""
_TRIES = 8
_ANSWER_TOKENS = 58
_TOGETHER = 128


@dataclass(frozen=True)
class Score:
    """Greedy answers to held-out problems: how many are right, and tokens of an answer.

    pass_at_1, pass_at_8: of sampled answers, the mean share right, and how often one of eight is.
    """

    accuracy: float
    easy_accuracy: float
    length: float
    pass_at_1: float
    pass_at_8: float


@dataclass(frozen=True)
class ReasonSummary:
    """summary.json of the reasoning demo. Times in seconds."""

    accuracy: float
    gained: float
    held_out: int
    before: Score
    cold_start: Score
    grpo: Score
    cold_start_s: float
    grpo_s: float
    steps: int
    answers: int
    rollout_tokens_per_s: float
    gap: float
    curve: list[dict[str, float]]
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """What happens now, in words."""

    text: str


def run_reason(
    folder: Path,
    demo: Path,
    *,
    seed: int = 0,
    cold_overrides: Sequence[str] = (),
    overrides: Sequence[str] = (),
    on_event: Callable[[Event | Stage], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ReasonSummary:
    """Cold start, GRPO, and an examination before and after each.

    Args:
        demo: a finished demo's folder.
        cold_overrides, overrides: of the cold start's and of GRPO's recipe.

    Raises UserError where `folder` holds something else, Stopped where `should_stop` said so and all is saved.
    """
    path = folder / SUMMARY
    if path.is_file():
        return _read(path)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / "cold-start.jsonl", cold_start(seed, _EXAMPLES))
        watched = list(examination(seed, _EXAMINED + _WATCHED))[_EXAMINED:]
        drawn = harder(seed, _PROBLEMS, held_out=_EXAMINED + _WATCHED)
        _write_lines(
            folder / "problems.jsonl", [{"problem": question(p), "answer": answer(p)} for p in [*watched, *drawn]]
        )
    on_event(Stage(f"cold start: {_EXAMPLES:,} easy problems, in which nothing is carried"))
    recipe = load_recipe(
        "spark-cold-start",
        [f"seed={seed}", *cold_overrides],
        sources=[str(folder / "cold-start.jsonl")],
        init_from=str(demo),
        base="sft",
    )
    cold = train(recipe, folder / COLD_START, opener=open_chats, on_event=on_event, should_stop=should_stop)
    on_event(Stage("GRPO: harder problems, and of these only the answers"))
    environment = f"grpo.environment={json.dumps(str(folder / 'problems.jsonl'))}"
    recipe = load_recipe(
        "spark-grpo",
        [f"seed={seed}", environment, f"grpo.held_out={_WATCHED}", *overrides],
        init_from=str(folder / COLD_START),
        base="grpo",
    )
    trained = train(recipe, folder / GRPO, opener=open_grpo, on_event=on_event, should_stop=should_stop)
    scores, examples = {}, []
    for name, run in (("before", demo), ("cold_start", folder / COLD_START), ("grpo", folder / GRPO)):
        if should_stop():
            raise Stopped("stopped during the examination; both runs are saved, the same command examines again")
        on_event(Stage(f"examination: {name.replace('_', ' ')}"))
        scores[name], shown = examine(run, seed)
        examples.append({"stage": name, **shown})
    rows = read_metrics(folder / GRPO)
    summary = ReasonSummary(
        accuracy=scores["grpo"].accuracy,
        gained=scores["grpo"].accuracy - scores["cold_start"].accuracy,
        held_out=_EXAMINED,
        before=scores["before"],
        cold_start=scores["cold_start"],
        grpo=scores["grpo"],
        cold_start_s=cold.train_s,
        grpo_s=trained.train_s,
        steps=trained.step,
        answers=sum(row["batch_size"] for row in rows),
        rollout_tokens_per_s=_mean([row["rollout_tokens_per_s"] for row in rows]),
        gap=max(row["gap"] for row in rows),
        curve=[_point(row) for row in rows],
        examples=examples,
    )
    write_text(path, json.dumps(asdict(summary), indent=2) + "\n")
    return summary


def examine(run: Path, seed: int, count: int = _EXAMINED) -> tuple[Score, dict[str, Any]]:
    """A checkpoint's score, and its answer to the first problem."""
    model = load_model(run, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(run)
    llm = LLM.from_model(
        model, tokenizer, options=EngineOptions(max_length=80, max_num_seqs=_TOGETHER, num_speculative_tokens=0)
    )
    problems, easy = list(examination(seed, count)), easy_examination(seed, count // 5)
    greedy = SamplingParams(temperature=0, max_tokens=_ANSWER_TOKENS)
    right, texts, lengths = _answered(llm, problems, greedy)
    tries = SamplingParams(n=_TRIES, max_tokens=_ANSWER_TOKENS, seed=seed)
    sampled, _, _ = _answered(llm, problems[: count // 4], tries)
    score = Score(
        accuracy=_mean([float(own[0]) for own in right]),
        easy_accuracy=_mean([float(own[0]) for own in _answered(llm, easy, greedy)[0]]),
        length=_mean(lengths),
        pass_at_1=_mean([_mean([float(ok) for ok in own]) for own in sampled]),
        pass_at_8=_mean([float(any(own)) for own in sampled]),
    )
    return score, {"prompt": question(problems[0]), "text": texts[0], "right": right[0][0]}


def _answered(
    llm: LLM, problems: Sequence[Problem], params: SamplingParams
) -> tuple[list[list[bool]], list[str], list[float]]:
    """For each problem whether each of its answers is right; the first's text and length."""
    prompts = [llm.encode_chat([{"role": "user", "content": question(problem)}]) for problem in problems]
    outputs = llm.generate(prompts, params)
    right = [
        [final_answer("", choice.text) == answer(problem) for choice in output.outputs]
        for problem, output in zip(problems, outputs, strict=True)
    ]
    texts = [output.outputs[0].text for output in outputs]
    return right, texts, [float(len(output.outputs[0].token_ids)) for output in outputs]


def _point(row: dict[str, Any]) -> dict[str, float]:
    names = ("step", "reward", "accuracy", "length", "entropy", "eval_accuracy")
    return {name: row[name] for name in names if name in row}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _read(path: Path) -> ReasonSummary:
    stored = json.loads(path.read_text(encoding="utf-8"))
    if stored.keys() != ReasonSummary.__dataclass_fields__.keys():
        raise UserError(f"{path} is not a reasoning demo's; give another folder with --run")
    stages = {name: Score(**stored[name]) for name in ("before", "cold_start", "grpo")}
    return ReasonSummary(**{**stored, **stages})
