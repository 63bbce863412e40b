"""A market model: the package's decoder between a front end and heads; and the forecasts that it makes of a panel.

In: a Panel. Out: for each session and member a score for every horizon, quantiles of the return ahead, and which
experts read the day. Each session's values come of that session and those before it alone, to the bit: rows are
computed in tiles whose results don't depend on what is computed beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fireflyer.errors import UserError
from fireflyer.market.features import TradedDays, bar_inputs, cross_rank, known_bars, log_returns, trailing_sigma
from fireflyer.market.front_end import BarFrontEnd, Packing, along_time, packing, read_bars
from fireflyer.market.heads import QUANTILES, MarketHeads
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import LONGEST_MONTH
from fireflyer.model.decoder import Decoder, TrunkOutput
from fireflyer.model.row_tiles import RowTiles


class BarNetwork(nn.Module):
    """Front end, decoder, heads; weights by the seed."""

    def __init__(self, decoder: Decoder, num_inputs: int, horizons: tuple[int, ...]) -> None:
        super().__init__()
        hidden = decoder.config.hidden_size
        self.decoder = decoder
        self.front_end = BarFrontEnd(num_inputs, hidden)
        self.heads = MarketHeads(hidden, horizons)


@dataclass(frozen=True)
class Forecast:
    """D sessions, N names, H horizons, Q quantiles, L MoE layers, E experts; NaN where a name has no forecast.

    scores: (D, N, H) float64. quantiles: (D, N, H, Q) of the log return from the close of t+1. expert_load: (D, L, E),
    bars of the day that chose each expert, over an even share.
    """

    horizons: tuple[int, ...]
    scores: NDArray[np.float64]
    quantiles: NDArray[np.float64]
    expert_load: NDArray[np.float64]

    def signal(self) -> NDArray[np.float64]:
        """(D, N): the mean of the ranks that the horizons' scores give a name among the day's. What lasts counts more
        than what a single horizon sees."""
        each = [self.scores[..., place] for place in range(len(self.horizons))]
        return np.mean([cross_rank(own, np.isfinite(own)) for own in each], axis=0)


def stitched(parts: list[tuple[Forecast, slice]], days: int) -> Forecast:
    """One forecast of `days` sessions: of each part its rows; NaN elsewhere."""

    def joined(pick: Callable[[Forecast], NDArray[np.float64]]) -> NDArray[np.float64]:
        whole = np.full((days, *pick(parts[0][0]).shape[1:]), np.nan)
        for part, rows in parts:
            whole[rows] = pick(part)[rows]
        return whole

    return Forecast(
        horizons=parts[0][0].horizons,
        scores=joined(lambda part: part.scores),
        quantiles=joined(lambda part: part.quantiles),
        expert_load=joined(lambda part: part.expert_load),
    )


@torch.no_grad()
def forecast(
    network: BarNetwork, panel: Panel, seq_len: int, input_names: tuple[str, ...] | None = None, first: int = 0
) -> Forecast:
    """Forecasts for the sessions from row `first` on.

    A calendar month is read in one pass after as many sessions before it as `seq_len` leaves (41 of 64), so that a
    session's forecast doesn't depend on where the panel begins or ends, if those sessions are there. A name has
    forecasts once its volatility is known, after 20 bars, on days when it is a member and trades.

    input_names: what the network was trained on; UserError where the panel's bars have other numbers.
    """
    heads = network.heads
    inputs, bars = bar_inputs(panel), known_bars(panel)
    if input_names is not None and inputs.names != input_names:
        lacks = [name for name in input_names if name not in inputs.names] or [
            f"no {name}" for name in inputs.names if name not in input_names
        ]
        raise UserError(
            f"{panel.origin.source}: the model reads bars with {lacks[0]}, which these don't have; give a panel like"
            " that which it was trained on, or train another"
        )
    sigma = trailing_sigma(TradedDays(bars), log_returns(panel))
    wanted = bars & panel.member & np.isfinite(sigma)
    days, names = panel.shape
    config = network.decoder.config
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    scores = np.full((days, names, len(heads.horizons)), np.nan)
    quantiles = np.full((*scores.shape, len(QUANTILES)), np.nan)
    load = np.zeros((days, layers, config.n_routed_experts))
    tiles = RowTiles(kv_tile=64)
    for start, stop in month_blocks(panel.dates, first):
        chosen = np.flatnonzero(wanted[start:stop].any(0))
        if not len(chosen):
            continue
        begin = max(0, start - (seq_len - LONGEST_MONTH))
        window = (slice(begin, stop), chosen)
        packed = packing(torch.from_numpy(bars[window].T.copy()))
        values = torch.from_numpy(inputs.values[window].swapaxes(0, 1).copy())
        out = read_bars(network.decoder, network.front_end, values, packed, tiles=tiles)
        hidden = along_time(out.hidden_BTD, packed.place_BT[:, start - begin :])
        there = wanted[start:stop, chosen].T
        for target, found in ((scores, heads.scores(hidden, tiles)), (quantiles, heads.quantiles(hidden, tiles))):
            block = np.where(there.reshape(*there.shape, *(1,) * (found.dim() - 2)), found.double().numpy(), np.nan)
            target[start:stop, chosen] = block.swapaxes(0, 1)
        _count_experts_(load, out, packed, wanted, begin, start, chosen)
    scale = np.sqrt(np.array(heads.horizons))[:, None]
    share = load.sum(-1, keepdims=True) / config.n_routed_experts
    return Forecast(
        horizons=heads.horizons,
        scores=scores,
        quantiles=quantiles * (sigma[..., None, None] * scale),
        expert_load=np.divide(load, share, out=np.full_like(load, np.nan), where=share > 0),
    )


def month_blocks(dates: NDArray[np.datetime64], first: int) -> list[tuple[int, int]]:
    """Rows (start, stop) of each calendar month from row `first` on."""
    months = dates.astype("datetime64[M]")
    starts = [first, *(np.flatnonzero(months[1:] != months[:-1]) + 1).tolist(), len(dates)]
    bounds = sorted({row for row in starts if row >= first})
    return list(pairwise(bounds))


def _count_experts_(
    load: NDArray[np.float64],
    out: TrunkOutput,
    packed: Packing,
    wanted: NDArray[np.bool_],
    begin: int,
    start: int,
    chosen: NDArray[np.int64],
) -> None:
    """Add the experts that the bars of a window from row `begin` chose to the sessions from `start` on."""
    held = packed.held_BT.numpy()
    day = packed.order_BT.numpy()[held] + begin
    name = np.broadcast_to(chosen[:, None], held.shape)[held]
    counted = (day >= start) & wanted[day, name]
    for layer, routing in enumerate(out.routing):
        experts = routing.indices_NK.numpy()[counted]
        np.add.at(load[:, layer], (np.repeat(day[counted], experts.shape[1]), experts.flatten()), 1.0)
