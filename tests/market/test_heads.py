"""The heads' losses against numpy's correlation, a grid search for quantiles, and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fireflyer.market.features import cross_rank
from fireflyer.market.front_end import along_time, packing
from fireflyer.market.heads import (
    QUANTILES,
    MarketHeads,
    ordered_quantiles,
    pinball_loss,
    rank_loss,
    square_loss,
    squareplus,
)


def day_losses(scores: np.ndarray, ranks: np.ndarray, known: np.ndarray) -> float:
    """Day by day and horizon by horizon, with numpy's own correlation."""
    losses = []
    for day in range(scores.shape[1]):
        for horizon in range(scores.shape[2]):
            own = known[:, day, horizon]
            if own.sum() >= 2:
                losses.append(1 - np.corrcoef(scores[own, day, horizon], ranks[own, day, horizon])[0, 1])
    return float(np.mean(losses)) if losses else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_rank_loss_is_one_minus_the_days_mean_correlation(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(17, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(17, 5, 3, generator=generator, dtype=torch.float64)
    known = torch.rand(17, 5, 3, generator=generator) < 0.7
    known[:, 2, 1] = False
    known[1:, 3, 0] = False  # one name alone can't be ranked
    ranks = torch.stack(
        [torch.from_numpy(cross_rank(returns[..., h].T.numpy(), known[..., h].T.numpy()).T) for h in range(3)], dim=-1
    )
    holes = ranks.masked_fill(~known, math.nan)
    loss = rank_loss(scores, holes, known)
    expected = day_losses(scores.detach().numpy(), np.nan_to_num(holes.numpy()), known.numpy())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
    assert bool((scores.grad[~known] == 0).all())


def test_equal_scores_have_a_finite_slope() -> None:
    scores = torch.zeros(6, 2, 1, requires_grad=True)
    loss = rank_loss(scores, torch.randn(6, 2, 1), torch.ones(6, 2, 1, dtype=torch.bool))
    loss.backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())
    assert float(loss.detach()) == pytest.approx(1.0)
    assert float(rank_loss(scores, scores, torch.zeros(6, 2, 1, dtype=torch.bool)).detach()) == 0.0


def test_square_loss_is_a_mean_over_what_is_known() -> None:
    known = torch.tensor([True, False, True])
    loss = square_loss(torch.tensor([1.0, 5.0, 2.0]), torch.tensor([0.0, math.nan, 4.0]), known)
    assert float(loss) == pytest.approx((1 + 4) / 2)


def test_pinball_loss_is_least_at_the_true_quantiles() -> None:
    values = torch.randn(20_001, generator=torch.Generator().manual_seed(0))
    known = torch.ones_like(values, dtype=torch.bool)
    grid = torch.linspace(-2.2, 2.2, 89)
    for place, level in enumerate(QUANTILES):
        losses = []
        for guess in grid:
            quantiles = torch.zeros(len(values), len(QUANTILES))
            quantiles[:, place] = guess
            losses.append(float(pinball_loss(quantiles, values, known)))
        assert float(grid[int(np.argmin(losses))]) == pytest.approx(float(values.quantile(level)), abs=0.06)


def test_pinball_loss_leaves_out_what_is_not_known() -> None:
    quantiles = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]] * 2)
    values = torch.tensor([2.0, math.nan])
    expected = np.mean([level * (2.0 - q) for level, q in zip(QUANTILES, (-1.0, -0.5, 0.0, 0.5, 1.0), strict=True)])
    assert float(pinball_loss(quantiles, values, torch.tensor([True, False]))) == pytest.approx(expected)


def test_quantiles_never_cross() -> None:
    free = torch.randn(500, 3, 5, generator=torch.Generator().manual_seed(1)) * 30
    ordered = ordered_quantiles(free)
    assert bool((ordered.diff(dim=-1) >= 0).all())
    torch.testing.assert_close(ordered[..., 2], free[..., 2])
    x = torch.linspace(-40, 40, 41, dtype=torch.float64)
    assert bool((squareplus(x) > 0).all())
    assert float(squareplus(torch.zeros(1))) == 1.0


def test_heads_have_a_score_and_five_quantiles_for_each_horizon() -> None:
    heads = MarketHeads(8, (1, 5, 20))
    hidden = torch.randn(4, 6, 8)
    assert heads.scores(hidden).shape == (4, 6, 3)
    assert heads.quantiles(hidden).shape == (4, 6, 3, 5)


def test_packing_leaves_out_days_without_a_bar_and_finds_them_again() -> None:
    there = torch.tensor([[True, False, True, True], [False, False, True, False], [True, True, True, True]])
    packed = packing(there)
    days = torch.arange(4).expand(3, 4)
    placed = along_time(days, packed.order_BT)
    assert placed[0, :3].tolist() == [0, 2, 3]
    assert placed[1, :1].tolist() == [2]
    assert packed.held_BT.sum(1).tolist() == [3, 1, 4]
    back = along_time(placed, packed.place_BT)
    assert bool((back == days)[there].all())
