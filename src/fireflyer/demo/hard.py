"""The hard demo: the demo's model on products and mixed expressions too, examined by kind and on longer numbers.

In: a folder. Out: a run folder like any other, whose summary.json also says how many held-out problems of each kind
came out right, as long as those in training and one digit longer, and what it cost. The same call again goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from fireflyer.data.expressions import (
    KINDS,
    Expression,
    ExpressionSource,
    format_expression,
    held_out_expressions,
    read_answer,
    worked_answer,
)
from fireflyer.demo.bill import USD_PER_HOUR, Bill, make_bill
from fireflyer.demo.examination import SCORED_TOGETHER, Question, Scoring, examine, summarised
from fireflyer.demo.receipt import bill_lines
from fireflyer.infer.llm import LLM
from fireflyer.train.events import Event
from fireflyer.train.loop import train
from fireflyer.train.recipe import Recipe, load_recipe

RECIPE = "spark-hard"
LONGER_OF_EACH = 100
_ANSWER_TOKENS = len(worked_answer(Expression("mixed", 1, "+", 1, 1))) + 1
_NAMES = {"sum": "sums", "difference": "differences", "product": "products", "mixed": "mixed"}


@dataclass(frozen=True)
class KindScore:
    """Of one kind of expression: right of those as long as in training, and of those one digit longer."""

    right: int
    held_out: int
    longer_right: int
    longer: int


@dataclass(frozen=True)
class HardSummary(Bill):
    """What summary.json of a hard demo holds beyond a run's own keys. accuracy, longer_accuracy: over all kinds."""

    accuracy: float
    held_out: int
    longer_accuracy: float
    longer: int
    kinds: dict[str, KindScore]
    examples: list[dict[str, Any]]


def run_hard(
    run_dir: Path,
    *,
    seed: int = 0,
    usd_per_hour: float = USD_PER_HOUR,
    overrides: Sequence[str] = (),
    on_event: Callable[[Event | Scoring], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> HardSummary:
    """Train, score by kind, and write the keys into summary.json.

    Raises UserError where `run_dir` holds another run, Stopped where `should_stop` said so and the run saved itself.
    """
    recipe = load_recipe(RECIPE, [f"seed={seed}", *overrides])
    train(recipe, run_dir, on_event=on_event, should_stop=should_stop)
    make = partial(_summarise, run_dir, recipe, usd_per_hour, on_event, should_stop)
    found = summarised(run_dir, HardSummary, make)
    kinds = {kind: KindScore(**score) for kind, score in found["kinds"].items()}
    return HardSummary(**{**found, "kinds": kinds})


def _summarise(
    run_dir: Path,
    recipe: Recipe,
    usd_per_hour: float,
    on_event: Callable[[Scoring], None],
    should_stop: Callable[[], bool],
) -> HardSummary:
    llm = LLM(run_dir, max_num_seqs=SCORED_TOGETHER)
    count = ExpressionSource.held_out_of_each
    asked = [(e, False) for kind in KINDS for e in held_out_expressions(recipe.seed, count, kind)]
    asked += [(e, True) for kind in KINDS for e in held_out_expressions(recipe.seed, LONGER_OF_EACH, kind, longer=True)]
    questions = [Question(format_expression(e), partial(_is_right, e)) for e, _ in asked]
    outputs, right = examine(llm, questions, _ANSWER_TOKENS, on_event, should_stop)

    verdicts = {(kind, longer): [] for kind in KINDS for longer in (False, True)}
    for ok, (expression, longer) in zip(right, asked, strict=True):
        verdicts[expression.kind, longer].append(ok)
    num_usual = count * len(KINDS)
    return HardSummary(
        **asdict(make_bill(run_dir, llm, recipe.seq_len, usd_per_hour, outputs[:num_usual])),
        accuracy=mean(right[:num_usual]),
        held_out=num_usual,
        longer_accuracy=mean(right[num_usual:]),
        longer=len(right) - num_usual,
        kinds={
            kind: KindScore(sum(usual), len(usual), sum(beyond), len(beyond))
            for kind in KINDS
            for usual, beyond in [(verdicts[kind, False], verdicts[kind, True])]
        },
        examples=[
            {
                "prompt": questions[place].prompt,
                "answer": outputs[place].outputs[0].text,
                "right": right[place],
                "longer": place >= num_usual,
            }
            for place in (*range(0, num_usual, count), *range(num_usual, len(right), LONGER_OF_EACH))
        ],
    )


def _is_right(expression: Expression, text: str) -> bool:
    return read_answer(text) == expression.result


def hard_receipt(s: HardSummary, run_dir: Path) -> list[str]:
    """Plain lines: what was learnt, kind by kind; the bill; what to try next."""
    lines = [
        f"{s.accuracy:.1%} of {s.held_out:,} problems it never saw are exactly right",
        "",
        f"{'':<16}{'as long as trained':>20}{'one digit longer':>20}",
    ]
    for kind, score in s.kinds.items():
        trained, longer = (
            f"{a} of {b}" for a, b in ((score.right, score.held_out), (score.longer_right, score.longer))
        )
        lines.append(f"  {_NAMES[kind]:<14}{trained:>20}{longer:>20}")
    lines.append("")
    for e in s.examples:
        lines.append(
            f"  {'ok   ' if e['right'] else 'wrong'} {e['prompt'].strip()} ...={e['answer'].rpartition('=')[2]}"
        )
    return [
        *lines,
        "",
        *bill_lines(s),
        "",
        "Try next",
        f'  fireflyer generate {run_dir} "{s.examples[2]["prompt"]}" --temperature 0',
        f"  fireflyer report {run_dir}",
    ]
