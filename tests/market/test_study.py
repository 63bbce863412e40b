"""Folds one after another: each session's scores come of a model that was trained before it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.features import EXECUTION_LAG, cross_rank
from fireflyer.market.model import MarketModel
from fireflyer.market.recipe import load_market_recipe
from fireflyer.market.study import Study, baseline_scores, study_folds, train_study
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(9, days=260, names=16, bars=False)
RECIPE = load_market_recipe(
    None,
    [
        "steps=2",
        "batch_size=8",
        "seq_len=40",
        "threads=1",
        "schedule.warmup_steps=1",
        "model.hidden_size=32",
        "model.n_routed_experts=4",
        "market.train_months=5",
        "market.test_months=3",
    ],
)
FOLDS = study_folds(PANEL, RECIPE.market)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "run"
    train_study(PANEL, FOLDS, RECIPE, path)
    return path


def test_folds_are_purged_for_the_longest_horizon() -> None:
    assert len(FOLDS) == 3
    for fold in FOLDS:
        assert fold.purge == EXECUTION_LAG + 20
        assert fold.test.start - fold.train.stop == fold.purge + 5


def test_each_session_is_scored_by_the_newest_model_before_it(folder: Path) -> None:
    study = Study.load(folder)
    scores = study.scores(PANEL)
    assert not np.isfinite(scores[: FOLDS[0].test.start]).any()
    for fold, model in zip(FOLDS, study.models, strict=True):
        assert model.record["tested"]["from"] == str(PANEL.dates[fold.test.start])
        np.testing.assert_array_equal(scores[fold.test], model.scores(PANEL)[fold.test])
    early = PANEL.slice(0, FOLDS[1].test.start + 9)
    np.testing.assert_array_equal(study.scores(early), scores[: len(early.dates)])


def test_the_signal_is_the_mean_of_the_horizons_ranks(folder: Path) -> None:
    out = Study.load(folder).forecast(PANEL)
    row = FOLDS[1].test.start + 3
    there = np.isfinite(out.scores[row, :, 0])
    ranks = [cross_rank(out.scores[row : row + 1, :, h], there[None])[0] for h in range(3)]
    np.testing.assert_allclose(out.signal()[row], np.mean(ranks, axis=0))


def test_a_fold_alone_and_an_empty_folder(folder: Path, tmp_path: Path) -> None:
    first = folder / f"test-{PANEL.dates[FOLDS[0].test.start]}"
    assert len(Study.load(first).models) == 1
    assert isinstance(Study.load(first).models[0], MarketModel)
    with pytest.raises(UserError, match="no trained market model"):
        Study.load(tmp_path)
    with pytest.raises(UserError, match=r"before .*from which on"):
        Study.load(folder).scores(PANEL.slice(0, 50))


def test_baselines_follow_the_same_folds() -> None:
    scores = baseline_scores(PANEL, FOLDS, 5)
    assert list(scores) == ["Ridge", "LightGBM"]
    for found in scores.values():
        assert not np.isfinite(found[: FOLDS[0].test.start]).any()
        assert np.isfinite(found[FOLDS[0].test.start :]).mean() > 0.7
