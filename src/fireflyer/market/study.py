"""A walk-forward study: a model for each fold, and one row of scores that no model had seen the answers to.

In: a Panel and a recipe. Out: `DIR/test-2022-01-04/`, a fold's run named after the first session that it is tested on;
scores (D, N), each session's by the newest model that was trained before it. The baselines' likewise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fireflyer.errors import UserError
from fireflyer.market.baselines import Fitted, fit_lightgbm, fit_ridge
from fireflyer.market.features import EXECUTION_LAG, Floats
from fireflyer.market.folds import Fold, walk_forward
from fireflyer.market.model import FOLD, MODEL, MarketModel
from fireflyer.market.network import Forecast, stitched
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import MarketRecipe, MarketSettings
from fireflyer.market.training import train_fold
from fireflyer.train.events import Event, Notice

_PREFIX = "test-"


def study_folds(
    panel: Panel, settings: MarketSettings, *, test_from: str | None = None, test_until: str | None = None
) -> list[Fold]:
    """The folds of a recipe, purged for its longest horizon. Raises UserError where there is no room for one."""
    return walk_forward(
        panel.dates,
        train_months=settings.train_months,
        test_months=settings.test_months,
        purge=EXECUTION_LAG + max(settings.horizons),
        embargo=settings.embargo,
        expanding=settings.expanding,
        test_from=test_from,
        test_until=test_until,
    )


def train_study(
    panel: Panel,
    folds: list[Fold],
    recipe: MarketRecipe,
    run_dir: str | Path,
    *,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Study:
    """Train every fold's model, or go on with it. Raises what `train_fold` raises."""
    models = []
    for number, fold in enumerate(folds, start=1):
        first, last = panel.dates[fold.test.start], panel.dates[fold.test.stop - 1]
        learned = f"{panel.dates[fold.train.start]} to {panel.dates[fold.train.stop - 1]}"
        on_event(Notice(f"fold {number} of {len(folds)}: learns from {learned}, is tested on {first} to {last}"))
        folder = Path(run_dir) / f"{_PREFIX}{first}"
        models.append(train_fold(panel, fold, recipe, folder, on_event=on_event, should_stop=should_stop))
    return Study(models)


@dataclass(frozen=True)
class Study:
    """The folds' models, by the session that each is first used on."""

    models: list[MarketModel]

    @classmethod
    def load(cls, run_dir: str | Path) -> Study:
        """All finished folds of a study's folder, or the one model of a fold's. Raises UserError."""
        run_dir = Path(run_dir)
        folders = sorted(path.parent.parent for path in run_dir.glob(f"{_PREFIX}*/{MODEL}/{FOLD}"))
        if not folders and not (run_dir / FOLD).is_file():
            raise UserError(f"{run_dir}: no trained market model in it; train one: fireflyer market train")
        return cls([MarketModel.load(folder) for folder in folders or [run_dir]])

    def forecast(self, panel: Panel) -> Forecast:
        """Each session's forecast by the newest model whose test had begun; none before the first one's.

        Raises UserError for a panel whose bars the models can't read.
        """
        parts = []
        for model, start, stop in self._spans(panel):
            parts.append((model.forecast(panel.slice(0, stop), start), slice(start, stop)))
        return stitched(parts, panel.shape[0])

    def model_at(self, panel: Panel) -> MarketModel:
        """The model for a panel's last session. Raises UserError where none had been trained by then."""
        return self._spans(panel)[-1][0]

    def scores(self, panel: Panel) -> Floats:
        """(D, N): the signal, see Forecast.signal."""
        return self.forecast(panel).signal()

    def _spans(self, panel: Panel) -> list[tuple[MarketModel, int, int]]:
        """(model, first row, row after its last); models that no session of the panel asks have none."""
        starts = [panel.row(model.record["tested"]["from"]) for model in self.models]
        stops = [*starts[1:], panel.shape[0]]
        spans = [(m, a, b) for m, a, b in zip(self.models, starts, stops, strict=True) if a < b]
        if not spans:
            first = self.models[0].record["tested"]["from"]
            raise UserError(
                f"{panel.origin.source}: ends on {panel.dates[-1]}, before {first}, from which on these models are used"
            )
        return spans


def baseline_scores(panel: Panel, folds: list[Fold], horizon: int, *, threads: int = 1) -> dict[str, Floats]:
    """By name (D, N): Ridge and LightGBM over the same folds, each session's by the newest."""
    fitted: dict[str, list[Fitted]] = {"Ridge": [], "LightGBM": []}
    for fold in folds:
        fitted["Ridge"].append(fit_ridge(panel, fold, horizon))
        fitted["LightGBM"].append(fit_lightgbm(panel, fold, horizon, threads=threads))
    stops = [*(fold.test.start for fold in folds[1:]), panel.shape[0]]
    scores = {}
    for name, models in fitted.items():
        whole = np.full(panel.shape, np.nan)
        for model, fold, stop in zip(models, folds, stops, strict=True):
            rows = slice(fold.test.start, stop)
            whole[rows] = model.scores(panel.slice(0, stop), fold.test.start)[rows]
        scores[name] = whole
    return scores
