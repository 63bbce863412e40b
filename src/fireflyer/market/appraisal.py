"""A study appraised: its decoders beside Ridge, LightGBM and the blend on the same folds, audited, with forecasts.

In: a panel, the study's models and the settings of a backtest. Out: an `Appraisal`, from which report and summary are
made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fireflyer.errors import Stopped
from fireflyer.market.audit import DATES, Audit, Finding, audit
from fireflyer.market.baselines import blend
from fireflyer.market.engine import BacktestSettings
from fireflyer.market.features import Floats
from fireflyer.market.folds import Fold
from fireflyer.market.forecast import Coverage, Fan, calibration, fan
from fireflyer.market.measure import Measured, cost_regime, measure
from fireflyer.market.panel import Dates, Panel
from fireflyer.market.pipelines import StudyPipeline
from fireflyer.market.study import Study, baseline_scores
from fireflyer.market.trials import NUM_TRIALS

DECODER, BLEND = "decoder", "decoder and Ridge"


@dataclass(frozen=True)
class Appraisal:
    """models: the decoder first. load: (T, L, E) by session of the test and MoE layer, over an even share. fan: of the
    name that the decoder ranks highest on the last session with scores; closes: (K,) its last prices, `closes_on`."""

    panel: Panel
    test: slice
    horizon: int
    trials: int
    costs: str
    models: tuple[Measured, ...]
    audit: Audit
    coverage: tuple[Coverage, ...]
    load: Floats
    fan: Fan
    closes: Floats
    closes_on: Dates

    @property
    def dates(self) -> Dates:
        """(T,) of the test."""
        return self.panel.dates[self.test]

    def figures(self) -> dict[str, Any]:
        """As plain numbers, for summary.json."""
        origin = self.panel.origin
        return {
            "source": origin.source,
            "sha256": origin.sha256,
            "universe": origin.universe,
            "tested": [str(self.dates[0]), str(self.dates[-1])],
            "horizon": self.horizon,
            "trials": self.trials,
            "costs": self.costs,
            "audit": self.audit.verdict(),
            "audit_passed": self.audit.passed,
            "findings": [asdict(finding) for finding in self.audit.findings],
            "models": {one.name: one.figures() for one in self.models},
        }


def appraise(
    panel: Panel,
    study: Study,
    settings: BacktestSettings,
    *,
    trials: int = NUM_TRIALS,
    audit_dates: int = DATES,
    on_part: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Appraisal:
    """Score, trade, audit. Raises UserError for bars that the models can't read, Stopped where `should_stop` says."""

    def step(text: str) -> None:
        if should_stop():
            raise Stopped("stopped; the models are saved, and the same command goes on from them")
        on_part(text)

    horizon = study.models[0].recipe.market.signal_horizon
    folds = [_fold(panel, model.record) for model in study.models]
    test = slice(folds[0].test.start, folds[-1].test.stop)
    step("forecasts of every session")
    forecast = study.forecast(panel)
    step("Ridge and LightGBM on the same folds")
    scores = {DECODER: forecast.signal(), **baseline_scores(panel, folds, horizon)}
    scores[BLEND] = blend(scores[DECODER], scores["Ridge"])
    models = []
    for name, own in scores.items():
        step(f"trading: {name}")
        models.append(measure(name, panel, own, test, settings, horizon, trials))
    step("the audit's nine tests")
    pipeline = StudyPipeline(study, settings)

    def on_finding(finding: Finding) -> None:
        step(f"{'passed' if finding.passed else 'FAILED'}: {finding.test}")

    judged = audit(pipeline, panel, dates=audit_dates, on_finding=on_finding)
    row = int(np.flatnonzero(np.isfinite(scores[DECODER][test]).any(1))[-1]) + test.start
    best = int(np.nanargmax(scores[DECODER][row]))
    traded = np.flatnonzero(panel.traded[: row + 1, best])[-60:]
    return Appraisal(
        panel=panel,
        test=test,
        horizon=horizon,
        trials=trials,
        costs=cost_regime(settings, panel),
        models=tuple(models),
        audit=judged,
        coverage=tuple(calibration(forecast, panel, test)),
        load=forecast.expert_load[test],
        fan=fan(forecast, panel, row, panel.symbols[best]),
        closes=panel.adjusted_close[traded, best] / panel.factor[row, best],
        closes_on=panel.dates[traded],
    )


def _fold(panel: Panel, record: dict[str, Any]) -> Fold:
    learned, tested = record["learned"], record["tested"]
    return Fold(
        slice(panel.row(learned["from"]), panel.row(learned["to"]) + 1),
        slice(panel.row(tested["from"]), min(panel.row(tested["to"]) + 1, panel.shape[0])),
        learned["purge"],
        learned["embargo"],
    )
