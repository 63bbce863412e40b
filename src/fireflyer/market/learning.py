"""What a fold's model learns from: windows of the names' bars, and what the heads are to make of them.

In: a Panel, cut where the fold's training must stop seeing, and the recipe. Out: for any step, drawn from the seed and
the step alone, one window of sessions and some names; its losses. Nothing here knows the test span.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from fireflyer.errors import UserError
from fireflyer.market.features import (
    TradedDays,
    bar_inputs,
    cross_rank,
    forward_returns,
    known_bars,
    log_returns,
    trailing_sigma,
)
from fireflyer.market.folds import Fold
from fireflyer.market.front_end import along_time, packing, read_bars
from fireflyer.market.heads import pinball_loss, rank_loss, square_loss
from fireflyer.market.network import BarNetwork
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import MarketRecipe
from fireflyer.model.experts import Routing
from fireflyer.model.routing import sequence_balance_loss
from fireflyer.train.objective import Part

RANK_SCALE = 3**0.5
"""Ranks are spread evenly over -1..1; times this their variance is 1."""


class BarLessons:
    """A fold's bars and labels as tensors, names first; N names, D sessions, F inputs, H horizons."""

    def __init__(self, panel: Panel, fold: Fold, recipe: MarketRecipe) -> None:
        """panel: sessions after `fold.known_until` may be there, and are not read."""
        self.recipe, self.fold = recipe, fold
        panel = panel.slice(0, fold.known_until)
        inputs = bar_inputs(panel)
        self.input_names = inputs.names
        bars, span = known_bars(panel), fold.train
        ahead = [forward_returns(panel, horizon) for horizon in recipe.market.horizons]
        sigma = trailing_sigma(TradedDays(bars), log_returns(panel))
        known = np.stack([np.isfinite(label) & np.isfinite(sigma) for label in ahead], axis=-1)
        known[: span.start] = known[span.stop :] = False
        ranks = np.stack(
            [cross_rank(label, mask) for label, mask in zip(ahead, known.transpose(2, 0, 1), strict=True)], axis=-1
        )
        horizons = recipe.market.horizons
        moves = np.stack([label / (sigma * days**0.5) for label, days in zip(ahead, horizons, strict=True)], axis=-1)
        if not known.any():
            raise UserError(
                f"{panel.origin.source}: no label between {panel.dates[span.start]} and {panel.dates[span.stop - 1]}:"
                " no name is a member, trades and is scaled there; check members and the span"
            )
        self.bars_NDF = names_first(inputs.values)
        self.there_ND = names_first(bars)
        self.member_ND = names_first(panel.member)
        self.known_NDH = names_first(known)
        self.ranks_NDH = names_first(np.nan_to_num(ranks * RANK_SCALE))
        self.moves_NDH = names_first(np.nan_to_num(moves))
        seen = inputs.values[span][bars[span]]
        self.centre_F = torch.from_numpy(seen.mean(0, dtype=np.float64)).float()
        self.scale_F = torch.from_numpy(seen.std(0, dtype=np.float64)).float().clamp(min=1e-3)
        self.scaler_span = (str(panel.dates[span.start]), str(panel.dates[span.stop - 1]))

    def set_scale_(self, network: nn.Module) -> None:
        """Have the network scale its inputs by the training span's statistics."""
        assert isinstance(network, BarNetwork)
        network.front_end.centre_F.copy_(self.centre_F)
        network.front_end.scale_F.copy_(self.scale_F)

    def sha256(self) -> str:
        """Of everything that is learned from."""
        return sha256_of(self.bars_NDF, self.there_ND, self.member_ND, self.known_NDH, self.ranks_NDH, self.moves_NDH)

    def part(self, network: nn.Module, step: int, mtp_weight: float) -> Part:
        """The loss of step `step`, with gradients."""
        assert isinstance(network, BarNetwork)
        window, names = draw(self.recipe, self.fold.train, self.member_ND, step)
        settings = self.recipe.market
        packed = packing(self.there_ND[names, window])
        bars = self.bars_NDF[names, window]
        depths = network.decoder.config.num_nextn_predict_layers if mtp_weight else 0
        out = read_bars(network.decoder, network.front_end, bars, packed, num_mtp=depths)
        known = self.known_NDH[names, window].clone()
        known[:, : settings.burn_in] = False
        ranks, moves = self.ranks_NDH[names, window], self.moves_NDH[names, window]

        def losses(hidden: Tensor, depth: int) -> tuple[Tensor, Tensor]:
            """Of MTP depth k: place i, having read the bar i+k too, forecasts as place i+k does."""
            place = packed.place_BT - depth
            own = known & (place >= 0)[..., None]
            place = place.clamp(0, hidden.shape[1] - 1)
            scores = along_time(network.heads.scores(hidden), place)
            rank = rank_loss(scores, ranks, own) + settings.square_weight * square_loss(scores, ranks, own)
            return rank, pinball_loss(along_time(network.heads.quantiles(hidden), place), moves, own)

        rank, pinball = losses(out.hidden_BTD, 0)
        mtp = rank.new_zeros(())
        for depth, hidden in enumerate(out.mtp_hidden, start=1):
            mtp = mtp + losses(hidden, depth)[0] / len(out.mtp_hidden)
        balance = balance_loss(out.routing, network.decoder.config.num_experts_per_tok)
        alpha = self.recipe.train.balance.sequence_alpha
        total = rank + settings.quantile_weight * pinball + mtp_weight * mtp + alpha * balance
        values = {"loss": rank, "quantile_loss": pinball, "mtp_loss": mtp, "balance_loss": balance}
        return Part(total, values, out.routing)


def draw(recipe: MarketRecipe, span: slice, member_ND: Tensor, step: int) -> tuple[slice, Tensor]:
    """A window of `seq_len` sessions whose losses lie in the training span, and the names that are read in it."""
    rng = np.random.default_rng([recipe.train.seed, step])
    seq_len = recipe.train.seq_len
    first = max(0, span.start - recipe.market.burn_in)
    start = int(rng.integers(first, max(first, span.stop - seq_len) + 1))
    window = slice(start, start + seq_len)
    members = member_ND[:, window].any(1).nonzero().flatten().numpy()
    return window, torch.from_numpy(np.sort(rng.permutation(members)[: recipe.train.batch_size]))


def sha256_of(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def balance_loss(routing: list[Routing], num_experts_per_tok: int) -> Tensor:
    """Sum over layers of the sequence-wise balance loss."""
    losses = [sequence_balance_loss(layer.scores_NE, layer.shape_BT, num_experts_per_tok) for layer in routing]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def names_first(values: np.ndarray) -> Tensor:
    wide = values.astype(np.float32) if values.dtype != np.bool_ else values
    return torch.from_numpy(np.ascontiguousarray(wide.swapaxes(0, 1)))
