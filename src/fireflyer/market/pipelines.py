"""What `audit` judges: a study's decoders, and Ridge on price features; both from bars to orders.

In: what was learned, and the settings of a backtest. Out: a `Pipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fireflyer.market.audit import Lesson
from fireflyer.market.baselines import Fitted, fit_ridge
from fireflyer.market.engine import BacktestResult, BacktestSettings, backtest
from fireflyer.market.features import Floats, bar_inputs, cross_rank, price_features
from fireflyer.market.folds import Fold
from fireflyer.market.panel import Panel
from fireflyer.market.portfolio import TopK
from fireflyer.market.study import Study


@dataclass(frozen=True)
class StudyPipeline:
    """The decoders of a study."""

    study: Study
    settings: BacktestSettings

    @property
    def horizons(self) -> Sequence[int]:
        market = self.study.models[0].recipe.market
        return market.signal_horizon, *market.horizons

    def features(self, panel: Panel) -> Floats:
        return bar_inputs(panel).values.astype(np.float64)

    def scores(self, panel: Panel) -> Floats:
        return self.study.scores(panel)

    def trade(self, panel: Panel, scores: Floats) -> BacktestResult:
        return backtest(panel, scores, self.settings)

    def narrowed(self, names: int) -> StudyPipeline:
        return replace(self, settings=_narrowed(self.settings, names))

    def relearned(self, panel: Panel, labels: Floats) -> Floats:
        return linear_scores(self.features(panel), labels, panel, self.lessons())

    def lessons(self) -> Sequence[Lesson]:
        records = [model.record for model in self.study.models]
        return [Lesson(_span(r["learned"]), _span(r["tested"]), _span(r["scaler"])) for r in records]


@dataclass(frozen=True)
class RidgePipeline:
    """Ridge on the fifteen price features, fitted for each fold; by the session from which each fit is used."""

    fitted: tuple[Fitted, ...]
    tested: tuple[tuple[str, str], ...]
    horizon: int
    settings: BacktestSettings

    @classmethod
    def fit(cls, panel: Panel, folds: Sequence[Fold], horizon: int, settings: BacktestSettings) -> RidgePipeline:
        """Raises UserError where a fold has no label."""
        tested = tuple((str(panel.dates[f.test.start]), str(panel.dates[f.test.stop - 1])) for f in folds)
        return cls(tuple(fit_ridge(panel, fold, horizon) for fold in folds), tested, horizon, settings)

    @property
    def horizons(self) -> Sequence[int]:
        return (self.horizon,)

    def features(self, panel: Panel) -> Floats:
        return price_features(panel)

    def scores(self, panel: Panel) -> Floats:
        scores = np.full(panel.shape, np.nan)
        starts = [panel.row(first) for first, _ in self.tested]
        for fitted, start, stop in zip(self.fitted, starts, [*starts[1:], panel.shape[0]], strict=True):
            if start < stop:
                scores[start:stop] = fitted.scores(panel.slice(0, stop), start)[start:stop]
        return scores

    def trade(self, panel: Panel, scores: Floats) -> BacktestResult:
        return backtest(panel, scores, self.settings)

    def narrowed(self, names: int) -> RidgePipeline:
        return replace(self, settings=_narrowed(self.settings, names))

    def relearned(self, panel: Panel, labels: Floats) -> Floats:
        return linear_scores(self.features(panel), labels, panel, self.lessons())

    def lessons(self) -> Sequence[Lesson]:
        return [Lesson(fitted.learned, tested) for fitted, tested in zip(self.fitted, self.tested, strict=True)]


def linear_scores(
    features: Floats, labels: Floats, panel: Panel, lessons: Sequence[Lesson], alpha: float = 1e3
) -> Floats:
    """(D, N) of the lessons' test spans: a ridge regression of the labels' ranks on features, for each lesson.

    features: (D, N, F); labels: (D, N).
    """
    known = np.isfinite(labels) & np.isfinite(features).all(-1)
    ranks = np.nan_to_num(cross_rank(labels, known))
    x = np.nan_to_num(features)
    scores = np.full(labels.shape, np.nan)
    for lesson in lessons:
        rows = slice(panel.row(lesson.learned[0]), panel.row(lesson.learned[1]) + 1)
        span = known[rows]
        a, b = x[rows][span], ranks[rows][span]
        weights = np.linalg.solve(a.T @ a + alpha * np.eye(x.shape[-1]), a.T @ b)
        tested = slice(panel.row(lesson.tested[0]), panel.row(lesson.tested[1]) + 1)
        scored = np.isfinite(features[tested]).all(-1) & panel.member[tested]
        scores[tested] = np.where(scored, x[tested] @ weights, np.nan)
    return scores


def _narrowed(settings: BacktestSettings, names: int) -> BacktestSettings:
    """Holding a quarter of so many names at most; mean-risk weighs its few by their scores anyway."""
    rule, most = settings.portfolio, max(names // 4, 1)
    if not isinstance(rule, TopK) or rule.names <= most:
        return settings
    return replace(settings, portfolio=replace(rule, names=most, drop=min(rule.drop, max(most // 3, 1))))


def _span(record: dict[str, str]) -> tuple[str, str]:
    return record["from"], record["to"]
