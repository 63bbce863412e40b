"""What the decoder stands beside in every report: Ridge and LightGBM on fifteen price features of the same folds.

In: a Panel and a Fold. Out: scores (D, N) of the fold's test span. Features and label are ranks among the names of a
day; a feature that isn't known counts as the middle. Both are deterministic: LightGBM row-wise on a fixed number of
threads. A linear model of ranks is a strong baseline on prices alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.market.features import (
    PRICE_FEATURES,
    Floats,
    TradedDays,
    cross_rank,
    forward_returns,
    known_bars,
    log_returns,
    price_features,
    trailing_sigma,
)
from fireflyer.market.folds import Fold
from fireflyer.market.panel import Panel

RIDGE_ALPHA = 1e5
"""Of ranks in -1..1, so that a fold's 150,000 rows give each feature a square sum of half of it."""
LIGHTGBM = {
    "n_estimators": 150,
    "learning_rate": 0.03,
    "num_leaves": 15,
    "min_child_samples": 500,
    "subsample": 0.7,
    "subsample_freq": 1,
    "colsample_bytree": 0.7,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


class Predictor(Protocol):
    """What a fitted model does."""

    def predict(self, X: NDArray) -> Any: ...


class Regressor(Predictor, Protocol):
    """What scikit-learn's and LightGBM's models have in common."""

    def fit(self, X: NDArray, y: NDArray) -> object: ...


@dataclass(frozen=True)
class Linear:
    """A linear model whose answer for a row doesn't depend on what is asked with it, as a matrix product's does."""

    weights: NDArray[np.float64]
    intercept: float

    def predict(self, X: NDArray) -> NDArray[np.float64]:
        total = np.full(len(X), self.intercept)
        for column, weight in zip(X.T, self.weights.tolist(), strict=True):
            total += weight * column
        return total


@dataclass(frozen=True)
class Fitted:
    """A baseline of one fold; `learned`: first and last session whose labels it saw."""

    name: str
    model: Predictor
    learned: tuple[str, str]

    def scores(self, panel: Panel, first: int = 0) -> Floats:
        """(D, N), NaN before row `first`, and where a name is no member, has no bar, or fewer than 20."""
        days = TradedDays(known_bars(panel))
        wanted = days.bars & panel.member & np.isfinite(trailing_sigma(days, log_returns(panel)))
        wanted[:first] = False
        scores = np.full(panel.shape, np.nan)
        if wanted.any():
            scores[wanted] = self.model.predict(_inputs(price_features(panel), wanted))
        return scores


def fit_ridge(panel: Panel, fold: Fold, horizon: int, alpha: float = RIDGE_ALPHA) -> Fitted:
    """Linear in the ranks, shrunk."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=alpha)
    fitted = _fit("Ridge", model, panel, fold, horizon)
    return replace(fitted, model=Linear(np.asarray(model.coef_, np.float64), float(model.intercept_)))


def fit_lightgbm(panel: Panel, fold: Fold, horizon: int, *, threads: int = 1, seed: int = 0) -> Fitted:
    """Boosted trees; other `threads` may give other bits."""
    from lightgbm import LGBMRegressor

    model = LGBMRegressor(**LIGHTGBM, n_jobs=threads, random_state=seed)
    return _fit("LightGBM", model, panel, fold, horizon)


def blend(*scores: Floats) -> Floats:
    """The mean of the models' ranks among the day's names; NaN where one of them has no score."""
    return np.mean([cross_rank(own, np.isfinite(own)) for own in scores], axis=0)


def _fit(name: str, model: Regressor, panel: Panel, fold: Fold, horizon: int) -> Fitted:
    panel = panel.slice(0, fold.known_until)
    label = forward_returns(panel, horizon)
    known = np.isfinite(label)
    known[: fold.train.start] = known[fold.train.stop :] = False
    span = str(panel.dates[fold.train.start]), str(panel.dates[fold.train.stop - 1])
    if not known.any():
        raise UserError(f"{panel.origin.source}: no label between {span[0]} and {span[1]}; check members and the span")
    model.fit(_inputs(price_features(panel), known), cross_rank(label, known)[known])
    return Fitted(name, model, span)


def _inputs(features: Floats, rows: NDArray[np.bool_]) -> Floats:
    inputs = np.nan_to_num(features[rows])
    assert inputs.shape[1] == len(PRICE_FEATURES)
    return inputs
