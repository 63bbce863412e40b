"""The demo: train `spark` on arithmetic, score problems it never saw, write the bill.

In: a folder. Out: a run folder like any other, whose summary.json also says how many held-out problems came out right
and what the run cost. The same call again goes on where it stopped; a finished demo is only read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import SUMMARY, read_metrics
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.data.arithmetic import Problem, format_problem, held_out_problems, read_answer, worked_answer
from fireflyer.errors import Stopped
from fireflyer.evaluate.machine import measure_matmul_flops_per_s
from fireflyer.evaluate.speculation import mtp_acceptance
from fireflyer.infer.llm import LLM
from fireflyer.infer.request import RequestOutput
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.train.events import Event
from fireflyer.train.loop import train
from fireflyer.train.recipe import Recipe, load_recipe

RECIPE = "spark"
USD_PER_HOUR = 0.10
"""About the rent of a machine with two cloud cores."""

_BALANCE_STEPS = 100
_ANSWER_TOKENS = len(worked_answer(1, "+", 1)) + 1
_SCORED_TOGETHER = 125


@dataclass(frozen=True)
class DemoSummary:
    """What summary.json of a demo holds beyond a run's own keys. Times in seconds, money in dollars.

    `max_vio` is the mean over the last 100 steps; `mfu` the share of this machine's measured matrix product rate;
    `mtp_acceptance` how often the MTP head's draft was what the model said.
    """

    accuracy: float
    held_out: int
    correct_sums: int
    sums: int
    correct_differences: int
    differences: int
    two_eight_digit_numbers: int
    correct_two_eight_digit_numbers: int
    train_s: float
    tokens: int
    flops: float
    matmul_flops_per_s: float
    mfu: float
    usd_per_hour: float
    usd: float
    max_vio: float
    mtp_acceptance: float
    parameters: int
    examples: list[dict[str, str | bool]]


@dataclass(frozen=True)
class Scoring:
    """Held-out problems are being answered: `done` of `total`."""

    done: int
    total: int
    correct: int


def run_demo(
    run_dir: Path,
    *,
    seed: int = 0,
    usd_per_hour: float = USD_PER_HOUR,
    overrides: Sequence[str] = (),
    on_event: Callable[[Event | Scoring], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DemoSummary:
    """Train, score, and write the demo's keys into summary.json.

    Raises UserError where `run_dir` holds another run, Stopped where `should_stop` said so and the run saved itself.
    """
    recipe = load_recipe(RECIPE, [f"seed={seed}", *overrides])
    train(recipe, run_dir, on_event=on_event, should_stop=should_stop)
    path = run_dir / SUMMARY
    stored = json.loads(path.read_text(encoding="utf-8"))
    if "accuracy" in stored:
        return DemoSummary(**{key: stored[key] for key in DemoSummary.__dataclass_fields__})
    summary = _summarise(run_dir, recipe, usd_per_hour, on_event, should_stop)
    write_text(path, json.dumps({**stored, **asdict(summary)}, indent=2) + "\n")
    return summary


def _summarise(
    run_dir: Path,
    recipe: Recipe,
    usd_per_hour: float,
    on_event: Callable[[Event | Scoring], None],
    should_stop: Callable[[], bool],
) -> DemoSummary:
    llm = LLM(run_dir, max_num_seqs=_SCORED_TOGETHER)
    problems = held_out_problems(recipe.seed)
    outputs = _answer(llm, problems, on_event, should_stop)
    right = [read_answer(output.outputs[0].text) == p.result for p, output in zip(problems, outputs, strict=True)]
    metrics = read_metrics(run_dir)
    train_s, tokens = metrics[-1]["train_s"], metrics[-1]["tokens"]
    config, counts = llm.config, count_parameters(llm.config)
    flops = tokens * (
        training_flops_per_token(config, recipe.seq_len) + mtp_training_flops_per_token(config, recipe.seq_len)
    )
    peak = measure_matmul_flops_per_s()
    sequences = [
        ([*output.prompt_token_ids, *output.outputs[0].token_ids], len(output.prompt_token_ids)) for output in outputs
    ]
    sums = [ok for ok, p in zip(right, problems, strict=True) if p.op == "+"]
    differences = [ok for ok, p in zip(right, problems, strict=True) if p.op == "-"]
    long = [ok for ok, p in zip(right, problems, strict=True) if min(p.a, p.b) >= 10_000_000]
    return DemoSummary(
        accuracy=mean(right),
        held_out=len(right),
        correct_sums=sum(sums),
        sums=len(sums),
        correct_differences=sum(differences),
        differences=len(differences),
        two_eight_digit_numbers=len(long),
        correct_two_eight_digit_numbers=sum(long),
        train_s=train_s,
        tokens=tokens,
        flops=flops,
        matmul_flops_per_s=peak,
        mfu=flops / train_s / peak,
        usd_per_hour=usd_per_hour,
        usd=train_s / 3600 * usd_per_hour,
        max_vio=mean(row["max_vio"] for row in metrics[-_BALANCE_STEPS:]),
        mtp_acceptance=mtp_acceptance(llm.model, sequences) or 0.0,
        parameters=counts.total + counts.mtp,
        examples=_examples(problems, outputs, right),
    )


def _answer(
    llm: LLM,
    problems: Sequence[Problem],
    on_event: Callable[[Event | Scoring], None],
    should_stop: Callable[[], bool],
) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    correct = 0
    for start in range(0, len(problems), _SCORED_TOGETHER):
        if should_stop():
            raise Stopped("stopped during the examination; the training is saved, the same command examines again")
        part = problems[start : start + _SCORED_TOGETHER]
        answers = llm.generate(
            [format_problem(*p) for p in part], SamplingParams(max_tokens=_ANSWER_TOKENS, temperature=0)
        )
        outputs += answers
        correct += sum(read_answer(a.outputs[0].text) == p.result for p, a in zip(part, answers, strict=True))
        on_event(Scoring(len(outputs), len(problems), correct))
    return outputs


def _examples(
    problems: Sequence[Problem], outputs: Sequence[RequestOutput], right: Sequence[bool]
) -> list[dict[str, str | bool]]:
    """The first sum and the first difference, and what went wrong first if anything did."""
    picked = {next(i for i, p in enumerate(problems) if p.op == op) for op in "+-"}
    picked |= {right.index(False)} if False in right else set()
    return [
        {"prompt": format_problem(*problems[i]), "answer": outputs[i].outputs[0].text, "right": right[i]}
        for i in sorted(picked)
    ]
