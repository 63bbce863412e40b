"""The heads that turn the decoder's hidden states into forecasts, and what they are trained on.

In: hidden states (..., D) of the trunk, one for each bar. Out: for every horizon a score that ranks the names of a day,
and five quantiles of the return ahead in units of the name's own trailing volatility. The decoder knows neither.

Scores are compared within a day only, so their loss is too: 1 - Pearson's correlation between the day's scores and the
ranks of what followed. Quantiles can't cross: all but the middle one are sums of positive steps away from it.
Everything is done row by row in arithmetic that is exact by the IEEE, or in tiles: no row feels those beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fireflyer.model.row_tiles import RowTiles

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class MarketHeads(nn.Module):
    """Shape suffixes: D hidden size · H horizons · Q quantiles."""

    def __init__(self, hidden_size: int, horizons: tuple[int, ...]) -> None:
        super().__init__()
        self.horizons = horizons
        self.rank = nn.Linear(hidden_size, len(horizons))
        self.quantile = nn.Linear(hidden_size, len(horizons) * len(QUANTILES))

    def scores(self, hidden: Tensor, tiles: RowTiles | None = None) -> Tensor:
        """(..., D) to (..., H)."""
        return affine(self.rank, hidden, tiles)

    def quantiles(self, hidden: Tensor, tiles: RowTiles | None = None) -> Tensor:
        """(..., D) to (..., H, Q), ascending along Q."""
        free = affine(self.quantile, hidden, tiles)
        return ordered_quantiles(free.unflatten(-1, (len(self.horizons), len(QUANTILES))))


def affine(layer: nn.Linear, x: Tensor, tiles: RowTiles | None) -> Tensor:
    """`layer(x)`; in tiles each row has the same bits whatever is computed beside it."""
    if tiles is None:
        return layer(x)
    assert layer.bias is not None
    return tiles.linear(x, layer.weight) + layer.bias


def squareplus(x: Tensor) -> Tensor:
    """(x + √(x² + 4)) / 2, a softplus without exponentials (arXiv 2112.11687): above 0, and 1 at 0."""
    return (x + (x * x + 4).sqrt()) / 2


def ordered_quantiles(free: Tensor) -> Tensor:
    """Any numbers (..., Q) to ascending ones: the middle as it is, the others by positive steps away from it."""
    middle = free.shape[-1] // 2
    steps = squareplus(free)
    above = steps[..., middle + 1 :].cumsum(-1)
    below = steps[..., :middle].flip(-1).cumsum(-1).flip(-1)
    centre = free[..., middle : middle + 1]
    return torch.cat((centre - below, centre, centre + above), dim=-1)


def rank_loss(scores: Tensor, ranks: Tensor, known: Tensor) -> Tensor:
    """1 - Pearson(scores, ranks) of each day and horizon, averaged over those that have names enough.

    Args:
        scores, ranks: (N, T, H): names, days, horizons; what is not known is ignored, whatever it holds.
        known: (N, T, H) bool.

    Returns:
        Scalar; 0 where no day has two names.
    """
    weight = known.to(scores.dtype)
    count = weight.sum(0)
    usable = count >= 2

    def centred(values: Tensor) -> Tensor:
        values = torch.where(known, values, values.new_zeros(()))
        return (values - values.sum(0) / count.clamp(min=1)) * weight

    x, y = centred(scores), centred(ranks)
    # The root is taken of what is safely above 0: where all scores of a day are alike its slope has no bound.
    spread = (x.square().sum(0) * y.square().sum(0) + 1e-12).sqrt()
    correlation = (x * y).sum(0) / spread
    return ((1 - correlation) * usable).sum() / usable.sum().clamp(min=1)


def square_loss(scores: Tensor, ranks: Tensor, known: Tensor) -> Tensor:
    """Mean square error of the scores as estimates of the ranks: keeps their scale, which correlation leaves free."""
    error = torch.where(known, scores - ranks, scores.new_zeros(()))
    return error.square().sum() / known.sum().clamp(min=1)


def pinball_loss(quantiles: Tensor, values: Tensor, known: Tensor) -> Tensor:
    """Mean of max(q·e, (q-1)·e), e = value - quantile (Koenker and Bassett 1978): least at the true quantiles.

    Args:
        quantiles: (..., Q) for `QUANTILES`.
        values: (...).
        known: (...) bool.
    """
    levels = torch.tensor(QUANTILES, dtype=quantiles.dtype, device=quantiles.device)
    error = torch.where(known, values, values.new_zeros(()))[..., None] - quantiles
    loss = torch.maximum(levels * error, (levels - 1) * error).mean(-1)
    return (loss * known).sum() / known.sum().clamp(min=1)
