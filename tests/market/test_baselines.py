"""Ridge against its normal equations; both baselines find a planted signal, in the same bits each time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.baselines import blend, fit_lightgbm, fit_ridge
from fireflyer.market.features import Floats, cross_rank, forward_returns, price_features
from fireflyer.market.folds import Fold
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(1, days=330, names=60, signal=0.3, bars=False)
FOLD = Fold(slice(60, 240), slice(261, 330), purge=6, embargo=15)


def mean_rank_correlation(scores: Floats, horizon: int) -> float:
    label = forward_returns(PANEL, horizon)
    found = []
    for row in range(FOLD.test.start, FOLD.test.stop):
        both = np.isfinite(scores[row]) & np.isfinite(label[row])
        if both.sum() > 10:
            ranks = cross_rank(np.stack([scores[row], label[row]]), np.stack([both, both]))[:, both]
            found.append(np.corrcoef(ranks)[0, 1])
    return float(np.mean(found))


def test_ridge_is_the_solution_of_its_normal_equations() -> None:
    alpha = 50.0
    label = forward_returns(PANEL.slice(0, FOLD.known_until), 5)
    known = np.isfinite(label)
    known[: FOLD.train.start] = known[FOLD.train.stop :] = False
    x = np.nan_to_num(price_features(PANEL.slice(0, FOLD.known_until))[known])
    y = cross_rank(label, known)[known]
    centred = x - x.mean(0)
    weights = np.linalg.solve(centred.T @ centred + alpha * np.eye(15), centred.T @ (y - y.mean()))
    fitted = fit_ridge(PANEL, FOLD, 5, alpha)
    scores = fitted.scores(PANEL, FOLD.test.start)
    expected = np.nan_to_num(price_features(PANEL)) @ weights + y.mean() - x.mean(0) @ weights
    there = np.isfinite(scores)
    np.testing.assert_allclose(scores[there], expected[there], atol=1e-9)
    assert not there[: FOLD.test.start].any()
    assert fitted.learned == (str(PANEL.dates[60]), str(PANEL.dates[239]))


def test_both_find_the_planted_signal_and_give_the_same_bits_twice() -> None:
    ridge = fit_ridge(PANEL, FOLD, 1, 100.0).scores(PANEL, FOLD.test.start)
    trees = fit_lightgbm(PANEL, FOLD, 1).scores(PANEL, FOLD.test.start)
    assert mean_rank_correlation(ridge, 1) > 0.08
    assert mean_rank_correlation(trees, 1) > 0.04
    assert trees.tobytes() == fit_lightgbm(PANEL, FOLD, 1).scores(PANEL, FOLD.test.start).tobytes()


@pytest.mark.parametrize("fit", [fit_ridge, fit_lightgbm])
def test_what_comes_after_the_fold_is_not_read(fit) -> None:
    """Statistics of the past only: a model fitted before a future that never was is the same model."""
    changed = PANEL.replace_future(FOLD.known_until - 1, "noise", np.random.default_rng(0))
    ours, theirs = (fit(panel, FOLD, 5).scores(PANEL) for panel in (PANEL, changed))
    assert ours.tobytes() == theirs.tobytes()


def test_a_blend_is_the_mean_of_ranks_where_both_have_a_score() -> None:
    a, b = np.array([[1.0, 2.0, 3.0, np.nan]]), np.array([[30.0, 20.0, np.nan, 10.0]])
    np.testing.assert_allclose(blend(a, b)[0, :2], [(-2 / 3 + 2 / 3) / 2, (0 + 0) / 2], atol=1e-12)
    assert np.isnan(blend(a, b)[0, 2:]).all()
    assert (np.argsort(blend(a, a)[0, :3]) == [0, 1, 2]).all()


def test_a_fold_without_labels_is_named() -> None:
    empty = replace(PANEL, member=np.zeros_like(PANEL.member))
    with pytest.raises(UserError, match="no label between"):
        fit_ridge(empty, FOLD, 5)


def test_a_row_is_scored_alike_to_the_bit_whatever_is_asked_beside_it() -> None:
    """A matrix product's bits depend on its shape."""
    for fit in (fit_ridge, fit_lightgbm):
        fitted = fit(PANEL, FOLD, 5)
        whole = fitted.scores(PANEL, FOLD.test.start)
        for row in range(FOLD.test.start + 1, FOLD.test.stop, 20):
            cut = fitted.scores(PANEL.slice(0, row), FOLD.test.start)
            assert whole[:row].tobytes() == cut.tobytes()
