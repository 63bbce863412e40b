"""The demo: train `spark` on arithmetic, score problems it never saw, write the bill.

In: a folder. Out: a run folder like any other, whose summary.json also says how many held-out problems came out right
and what the run cost. The same call again goes on where it stopped; a finished demo is only read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean

from fireflyer.data.arithmetic import Problem, format_problem, held_out_problems, read_answer, worked_answer
from fireflyer.demo.bill import USD_PER_HOUR, Bill, make_bill
from fireflyer.demo.examination import SCORED_TOGETHER, Question, Scoring, examine, summarised
from fireflyer.infer.llm import LLM
from fireflyer.infer.request import RequestOutput
from fireflyer.train.events import Event
from fireflyer.train.loop import train
from fireflyer.train.recipe import Recipe, load_recipe

RECIPE = "spark"
_ANSWER_TOKENS = len(worked_answer(1, "+", 1)) + 1


@dataclass(frozen=True)
class DemoSummary(Bill):
    """What summary.json of a demo holds beyond a run's own keys."""

    accuracy: float
    held_out: int
    correct_sums: int
    sums: int
    correct_differences: int
    differences: int
    two_eight_digit_numbers: int
    correct_two_eight_digit_numbers: int
    examples: list[dict[str, str | bool]]


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
    make = partial(_summarise, run_dir, recipe, usd_per_hour, on_event, should_stop)
    return DemoSummary(**summarised(run_dir, DemoSummary, make))


def _summarise(
    run_dir: Path,
    recipe: Recipe,
    usd_per_hour: float,
    on_event: Callable[[Scoring], None],
    should_stop: Callable[[], bool],
) -> DemoSummary:
    llm = LLM(run_dir, max_num_seqs=SCORED_TOGETHER)
    problems = held_out_problems(recipe.seed)
    questions = [Question(format_problem(*p), partial(_is_right, p)) for p in problems]
    outputs, right = examine(llm, questions, _ANSWER_TOKENS, on_event, should_stop)
    sums = [ok for ok, p in zip(right, problems, strict=True) if p.op == "+"]
    differences = [ok for ok, p in zip(right, problems, strict=True) if p.op == "-"]
    long = [ok for ok, p in zip(right, problems, strict=True) if min(p.a, p.b) >= 10_000_000]
    return DemoSummary(
        **asdict(make_bill(run_dir, llm, recipe.seq_len, usd_per_hour, outputs)),
        accuracy=mean(right),
        held_out=len(right),
        correct_sums=sum(sums),
        sums=len(sums),
        correct_differences=sum(differences),
        differences=len(differences),
        two_eight_digit_numbers=len(long),
        correct_two_eight_digit_numbers=sum(long),
        examples=_examples(problems, outputs, right),
    )


def _is_right(problem: Problem, text: str) -> bool:
    return read_answer(text) == problem.result


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
