"""The market's evidence: five half-years that no recipe was chosen on, three seeds, beside Ridge and LightGBM.

    make proof PART=market

The recipe was fixed on sessions before 2022-01 (fireflyer/market/trials.py has all that was tried); this opens those
from 2022-01 to 2024-06. Stopped, it goes on after the last checkpoint.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from fireflyer.errors import UserError
from fireflyer.market.audit import audit
from fireflyer.market.baselines import blend
from fireflyer.market.data.ashares import read_ashares
from fireflyer.market.engine import BacktestSettings
from fireflyer.market.measure import HORIZONS, Measured, by_rows, cost_regime, measure
from fireflyer.market.pipelines import StudyPipeline
from fireflyer.market.recipe import load_market_recipe
from fireflyer.market.study import baseline_scores, study_folds, train_study
from fireflyer.market.trials import NUM_TRIALS
from fireflyer.train.events import Event, Finished, Notice

SEEDS = (0, 1, 2)
FROM, UNTIL = "2022-01-01", "2024-06-30"
ANCHORS = {"Ridge": 0.069, "LightGBM": 0.056}
"""RankIC of an earlier measurement on this panel, with other feature definitions."""
RUNS = ROOT / "runs" / "proof-market"


def main() -> Proof:
    """Everything in one process, so that all stand on the same folds."""
    try:
        panel = read_ashares()
    except UserError as error:
        raise SystemExit(str(error)) from None
    recipes = [load_market_recipe(None, [f"seed={seed}"]) for seed in SEEDS]
    market, settings = recipes[0].market, BacktestSettings()
    horizon = market.signal_horizon
    folds = study_folds(panel, market, test_from=FROM, test_until=UNTIL)
    began = time.perf_counter()
    studies = [
        train_study(panel, folds, recipe, RUNS / f"seed-{seed}", on_event=_say)
        for seed, recipe in zip(SEEDS, recipes, strict=True)
    ]
    trained_s = time.perf_counter() - began
    scores = {f"decoder, seed {seed}": study.scores(panel) for seed, study in zip(SEEDS, studies, strict=True)}
    scores["decoder, mean of seeds"] = blend(*scores.values())
    scores |= baseline_scores(panel, folds, horizon)
    scores["decoder and Ridge"] = blend(scores["decoder, mean of seeds"], scores["Ridge"])
    test = slice(folds[0].test.start, folds[-1].test.stop)
    found = [measure(name, panel, own, test, settings, horizon, NUM_TRIALS) for name, own in scores.items()]
    judged = audit(StudyPipeline(studies[0], settings), panel)
    by_name = {one.name: one for one in found}
    seeds = [by_name[f"decoder, seed {seed}"] for seed in SEEDS]
    figures = {
        "models": {one.name: one.figures() for one in found},
        "folds": _folds(panel, folds, found, horizon),
        "anchors": ANCHORS,
        "trials": NUM_TRIALS,
        "least_t": min(one.rank_ic.t for one in seeds),
        "train_s": trained_s,
        "sessions": test.stop - test.start,
        "names": len(panel.symbols),
        "sha256": panel.origin.sha256,
        "cost_regime": cost_regime(settings, panel),
        "audit": {finding.test: finding.detail for finding in judged.findings},
        "audit_verdict": judged.verdict(),
    }
    return Proof(figures, _tables(figures, found), {}, _missed(by_name, seeds, judged.failed))


def _missed(by_name: dict[str, Measured], seeds: list[Measured], failed: tuple[str, ...]) -> list[str]:
    missed = [
        f"{one.name}: RankIC above 3 standard errors: {one.rank_ic.mean:.4f} is {one.rank_ic.t:.1f}"
        for one in seeds
        if one.rank_ic.t <= 3
    ]
    ridge, both = by_name["Ridge"].rank_ic.mean, by_name["decoder and Ridge"].rank_ic.mean
    if both <= ridge:
        missed.append(f"the blend above Ridge: RankIC {both:.4f} against {ridge:.4f}")
    return missed + [f"the audit of seed 0 passes: {test} failed" for test in failed]


def _folds(panel: Any, folds: list[Any], found: list[Measured], horizon: int) -> list[dict[str, Any]]:
    spans = [fold.test for fold in folds]
    each = {one.name: by_rows(one.daily, spans, horizon) for one in found}
    return [
        {
            "tested": [str(panel.dates[span.start]), str(panel.dates[span.stop - 1])],
            "rank_ic": {name: values[place].mean for name, values in each.items()},
        }
        for place, span in enumerate(spans)
    ]


def _tables(figures: dict[str, Any], found: list[Measured]) -> dict[str, Table]:
    models = [
        [
            one.name,
            f"{one.rank_ic.mean:.4f} ± {one.rank_ic.standard_error:.4f}",
            f"{one.rank_ic.t:.1f}",
            f"{one.ic.mean:.4f}",
            f"{one.rank_ic.icir:.2f}",
            f"{one.gross:+.1%}",
            f"{one.net:+.1%}",
            f"{one.drawdown:.1%}",
            f"{one.turnover:.1%}",
            f"{one.sharpe:.2f}",
            f"{one.deflated.probability:.0%}",
        ]
        for one in found
    ]
    columns = [
        "",
        "RankIC",
        "in s.e.",
        "IC",
        "ICIR a day",
        "gross a year",
        "net a year",
        "drawdown",
        "turnover a session",
    ]
    folds = [
        [" to ".join(fold["tested"]), *(f"{value:.3f}" for value in fold["rank_ic"].values())]
        for fold in figures["folds"]
    ]
    decay = [[one.name, *(f"{c.mean:.3f} ± {c.standard_error:.3f}" for c in one.decay)] for one in found]
    return {
        "models": Table([*columns, "net Sharpe", "above the best of the trials"], models),
        "folds": Table(["tested", *(one.name for one in found)], folds),
        "decay": Table(["RankIC over", *(f"{horizon} sessions" for horizon in HORIZONS)], decay),
        "audit": Table(["test", "seen"], [[test, detail] for test, detail in figures["audit"].items()]),
    }


def _say(event: Event) -> None:
    if isinstance(event, Notice):
        print(event.text, file=sys.stderr, flush=True)
    elif isinstance(event, Finished):
        print(f"{event.run_dir.name}: trained", file=sys.stderr, flush=True)
