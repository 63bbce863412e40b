"""The size dial: five sizes on the standard library, one tokenizer; the rule's learning rate beside others.

Each size sees a tenth of the tokens that the rule gives it (all of them would take a day on two cores); rate and batch
follow the rule for that length. If loss falls by a power of the compute, the points lie on a line in the picture.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks._chart import Line, log_chart
from benchmarks._result import ROOT, Proof, Table
from benchmarks._runs import train_all
from fireflyer.cost.flops import training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.train.recipe import load_recipe
from fireflyer.train.settings import Recipe

SIZES = ("250K", "500K", "1M", "2M", "4M")
SWEPT = ("500K", "2M")
FACTORS = (0.25, 0.5, 2, 4)
SHARE = 0.1
VOCABULARY = "model.vocab_size=1024"


def main() -> Proof:
    """Held-out bits per byte of every size at the rule's rate, and of two sizes at others."""
    with tempfile.TemporaryDirectory() as folder:
        first = train_all(Path(folder), {SIZES[0]: _words(SIZES[0], 1, None)})
        tokenizer = Path(folder) / SIZES[0] / "tokenizer.json"
        largest_first = sorted(SIZES[1:], key=SIZES.index, reverse=True)
        commands = {size: _words(size, 1, tokenizer) for size in largest_first}
        commands |= {f"{size} x{factor:g}": _words(size, factor, tokenizer) for size in SWEPT for factor in FACTORS}
        rows = first | train_all(Path(folder), commands)
    bits = {name: run[-1]["bits_per_byte"] for name, run in rows.items()}
    recipes = {size: _recipe(size) for size in SIZES}
    compute = {size: _compute(recipe) for size, recipe in recipes.items()}
    slope, fit = _line([math.log(compute[size]) for size in SIZES], [math.log(bits[size]) for size in SIZES])
    swept = {size: {1.0: bits[size], **{f: bits[f"{size} x{f:g}"] for f in FACTORS}} for size in SWEPT}
    lost = {size: by_factor[1.0] / min(by_factor.values()) - 1 for size, by_factor in swept.items()}
    _draw(compute, bits, slope)
    ladder = [
        [
            size,
            f"{count_parameters(recipe.model).active:,}",
            f"{recipe.total_tokens:,}",
            f"{recipe.schedule.lr:g}",
            str(recipe.batch_size * recipe.seq_len),
            f"{bits[size]:.3f}",
        ]
        for size, recipe in recipes.items()
    ]
    sweep = [
        [size, *(f"{swept[size][factor]:.3f}" for factor in sorted(swept[size])), f"{lost[size]:.1%}"] for size in SWEPT
    ]
    tables = {
        "ladder": Table(["size", "active", "tokens", "learning rate", "tokens a step", "bits per byte"], ladder),
        "sweep": Table(
            ["size", *(f"rate x {factor:g}" for factor in sorted({1.0, *FACTORS})), "rule over the best"], sweep
        ),
    }
    figures = {
        "bits_per_byte": bits,
        "compute_flops": compute,
        "exponent": slope,
        "correlation_of_logarithms": fit,
        "rule_over_best_rate": lost,
        "share_of_tokens": SHARE,
    }
    missed = []
    if fit > -0.99:
        missed.append(f"a line on logarithmic axes (correlation -0.99): {fit:.3f}")
    missed += [
        f"{size}: the rule's rate within 2 % of the best: {over:.1%}" for size, over in lost.items() if over > 0.02
    ]
    return Proof(figures, tables, missed=missed)


def _words(size: str, factor: float, tokenizer: Path | None) -> list[str]:
    recipe = _recipe(size)
    rate = recipe.schedule.lr * factor
    words = ["--size", size, "--data", "builtin:stdlib"]
    words += ["--tokenizer", str(tokenizer)] if tokenizer else []
    settings = {
        "tokens": recipe.total_tokens,
        "schedule.lr": rate,
        "schedule.cosine_lr": rate / 10,
        "eval_every": 1_000_000,
        "eval_rows": 128,
        "checkpoint_every": 1_000_000,
        "threads": 1,
    }
    return [
        *words,
        "--set",
        VOCABULARY,
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]


def _recipe(size: str) -> Recipe:
    full = load_recipe(size=size, overrides=[VOCABULARY])
    assert full.total_tokens is not None
    return load_recipe(size=size, overrides=[VOCABULARY, f"tokens={int(full.total_tokens * SHARE)}"])


def _compute(recipe: Recipe) -> float:
    assert recipe.total_tokens is not None
    return training_flops_per_token(recipe.model, recipe.seq_len) * recipe.total_tokens


def _line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Slope of the least squares line, and the correlation."""
    x_mean, y_mean = fmean(xs), fmean(ys)
    xy = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    xx, yy = sum((x - x_mean) ** 2 for x in xs), sum((y - y_mean) ** 2 for y in ys)
    return xy / xx, xy / math.sqrt(xx * yy)


def _draw(compute: dict[str, float], bits: dict[str, float], exponent: float) -> None:
    points = [(count, bits[size]) for size, count in compute.items()]
    middle = [math.exp(fmean(math.log(value) for value in values)) for values in zip(*points, strict=True)]
    line = [(count, middle[1] * (count / middle[0]) ** exponent) for count, _ in (points[0], points[-1])]
    marks = [
        10**power for power in range(math.ceil(math.log10(points[0][0])), math.floor(math.log10(points[-1][0])) + 1)
    ]
    chart = log_chart(
        "The size dial: held-out bits per byte",
        "training FLOPs",
        "bits per byte",
        marks,
        [
            Line("sizes", points, "#b86a00"),
            Line(f"compute to the power {exponent:.3f}", line, "#777777", dashed=True),
        ],
    )
    (ROOT / "docs" / "train-ladder.svg").write_text(chart, encoding="utf-8")
