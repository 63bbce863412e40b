"""The second front end: a name's returns as two-level tokens, so that the decoder writes scenarios as it writes text.

In: log returns in units of the trailing volatility of the day before. Out: two digits: a coarse bin, which is the
decoder's vocabulary, and a fine one inside it. The edges are fixed: even steps of asinh, which is fine near nought and
wide in the tails; no codebook is learned. The fine digit is predicted knowing the coarse one. Scenarios are for risk,
not for alpha: paths are drawn by the decoder with its cache, each path carrying on its own volatility.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fireflyer.data.packing import NO_LABEL
from fireflyer.errors import UserError
from fireflyer.market.features import (
    SIGMA_DAYS,
    SIGMA_FLOOR,
    Floats,
    TradedDays,
    known_bars,
    log_returns,
    shifted,
    trailing_sigma,
)
from fireflyer.market.folds import Fold
from fireflyer.market.front_end import along_time, of_bars, packing
from fireflyer.market.learning import draw, names_first, sha256_of
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import MarketRecipe
from fireflyer.model.cache import ContiguousCache
from fireflyer.model.decoder import Decoder
from fireflyer.train.losses import count_valid, training_losses
from fireflyer.train.objective import Part

COARSE = 64
FINE = 16
REACH = 8.0
"""Standard deviations at the outermost edges."""
_TOP = float(np.arcsinh(REACH))


def encode(scaled: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Coarse and fine digit of each scaled return; what lies beyond the edges falls into the outermost cell."""
    place = (np.arcsinh(np.clip(scaled, -REACH, REACH)) / _TOP + 1) / 2 * (COARSE * FINE)
    cell = np.clip(np.floor(place), 0, COARSE * FINE - 1).astype(np.int64)
    return cell // FINE, cell % FINE


def decode(coarse: Tensor, fine: Tensor) -> Tensor:
    """The scaled return in the middle of a cell, float64."""
    cell = (coarse * FINE + fine).double()
    return torch.sinh(((cell + 0.5) / (COARSE * FINE) * 2 - 1) * _TOP)


class TokenNetwork(nn.Module):
    """The decoder speaks the coarse digit; the fine one has an embedding and a head of its own."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        hidden = decoder.config.hidden_size
        self.decoder = decoder
        self.fine_embedding = nn.Embedding(FINE, hidden)
        self.coarse_condition = nn.Embedding(COARSE, hidden)
        self.fine_head = nn.Linear(hidden, FINE)

    def embed(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """(...) and (...) to (..., D)."""
        return self.decoder.embed(coarse) + self.fine_embedding(fine)

    def fine_logits(self, hidden: Tensor, coarse: Tensor) -> Tensor:
        """(..., D) and the coarse digit that comes next, (...), to (..., FINE)."""
        return self.fine_head(F.silu(hidden + self.coarse_condition(coarse)))


class TokenLessons:
    """A fold's tokens: each bar is to be told from those before it. The sessions of the training span alone."""

    input_names = ("coarse", "fine")

    def __init__(self, panel: Panel, fold: Fold, recipe: MarketRecipe) -> None:
        self.recipe, self.fold = recipe, fold
        panel = panel.slice(0, fold.train.stop)
        scaled = scaled_returns(panel)
        there = np.isfinite(scaled)
        coarse, fine = encode(np.where(there, scaled, 0.0))
        self.there_ND = names_first(there)
        self.member_ND = names_first(panel.member & there)
        self.coarse_ND, self.fine_ND = (torch.from_numpy(np.ascontiguousarray(digit.T)) for digit in (coarse, fine))
        span = panel.dates[fold.train]
        self.scaler_span = (str(span[0]), str(span[-1]))
        if not bool(self.member_ND[:, fold.train].any()):
            raise UserError(
                f"{panel.origin.source}: no bar of a member from {span[0]} to {span[-1]}; check members and the span"
            )

    def set_scale_(self, network: nn.Module) -> None:
        """Tokens have fixed edges: there is nothing to set."""

    def sha256(self) -> str:
        """Of everything that is learned from."""
        return sha256_of(self.there_ND, self.member_ND, self.coarse_ND, self.fine_ND)

    def part(self, network: nn.Module, step: int, mtp_weight: float) -> Part:
        """The cross entropy of the next bar's two digits; MTP of the coarse one, as for text."""
        assert isinstance(network, TokenNetwork)
        window, names = draw(self.recipe, self.fold.train, self.member_ND, step)
        packed = packing(self.there_ND[names, window])
        coarse_BT, fine_BT = (
            along_time(digit[names, window], packed.order_BT) for digit in (self.coarse_ND, self.fine_ND)
        )
        held_BT = packed.held_BT
        decoder = network.decoder
        depths = decoder.config.num_nextn_predict_layers if mtp_weight else 0
        out = decoder.trunk(inputs_embeds=network.embed(coarse_BT, fine_BT), num_mtp=depths)
        labels_BT = torch.full_like(coarse_BT, NO_LABEL)
        labels_BT[:, :-1] = coarse_BT[:, 1:].masked_fill(~held_BT[:, 1:], NO_LABEL)
        terms = training_losses(
            out,
            decoder.head_weight,
            labels_BT,
            None,
            num_experts_per_tok=decoder.config.num_experts_per_tok,
            valid_in_batch=count_valid(labels_BT),
            rows_in_batch=len(names),
        )
        known = (labels_BT != NO_LABEL)[:, :-1]
        logits = network.fine_logits(out.hidden_BTD[:, :-1][known], coarse_BT[:, 1:][known])
        fine = F.cross_entropy(logits, fine_BT[:, 1:][known])
        total = terms.total(mtp_weight, self.recipe.train.balance.sequence_alpha) + fine
        values = {"loss": terms.main + fine, "fine_loss": fine, "mtp_loss": terms.mtp, "balance_loss": terms.balance}
        return Part(total, values, [of_bars(routing, held_BT) for routing in out.routing])


def scaled_returns(panel: Panel) -> Floats:
    """(D, N) log returns over the volatility that was known the day before; NaN where it was not."""
    days, returns = TradedDays(known_bars(panel)), log_returns(panel)
    return returns / days.spread(shifted(days.gather(trailing_sigma(days, returns))))


@dataclass(frozen=True)
class Scenarios:
    """paths: (N names, P paths, H days) cumulative log returns from the close of the session they begin after."""

    symbols: tuple[str, ...]
    paths: NDArray[np.float64]


@torch.no_grad()
def sample_scenarios(
    network: TokenNetwork,
    panel: Panel,
    row: int,
    *,
    symbols: tuple[str, ...],
    days: int,
    num_paths: int,
    seq_len: int,
    seed: int = 0,
) -> Scenarios:
    """Paths of traded days after session `row`, drawn digit by digit; the same for the same seed and threads.

    A name's last bars, as many as `seq_len` leaves beside the path, are read once into a cache; its paths go on from
    copies of that. Volatility is carried on along each path by its own returns.

    Raises UserError for a name with fewer than 20 bars by then, or a path longer than half of `seq_len`.
    """
    if days > seq_len // 2:
        raise UserError(f"scenarios of {days} days: the model looks back over {seq_len} and can write {seq_len // 2}")
    known = panel.slice(0, row + 1)
    columns = [known.symbols.index(symbol) for symbol in symbols]
    returns = log_returns(known)[:, columns]
    scaled = scaled_returns(known)[:, columns]
    histories, squares = [], []
    for symbol, own_returns, own_scaled in zip(symbols, returns.T, scaled.T, strict=True):
        history = own_scaled[np.isfinite(own_scaled)][-(seq_len - days) :]
        moves = own_returns[np.isfinite(own_returns)][-SIGMA_DAYS:]
        if not len(history):
            raise UserError(f"{symbol}: {len(moves)} bars by {known.dates[-1]}; scenarios need {SIGMA_DAYS + 1}")
        histories.append(history)
        squares.append(moves**2)
    generator = torch.Generator().manual_seed(seed)
    cache, hidden_BD = _read_histories(network, histories, num_paths, days)
    recent = torch.from_numpy(np.stack(squares)).repeat_interleave(num_paths, dim=0)
    total = torch.zeros(len(recent), dtype=torch.float64)
    paths = []
    for day in range(days):
        coarse = _drawn(network.decoder.head(hidden_BD)[:, :COARSE], generator)
        fine = _drawn(network.fine_logits(hidden_BD, coarse), generator)
        move = decode(coarse, fine) * recent.mean(1).sqrt().clamp(min=SIGMA_FLOOR)
        total = total + move
        paths.append(total)
        recent = torch.cat((recent[:, 1:], move[:, None] ** 2), dim=1)
        if day + 1 < days:
            hidden_BD = _advance(network, cache, coarse[:, None], fine[:, None])[:, 0]
    drawn = torch.stack(paths, dim=-1).unflatten(0, (len(symbols), num_paths))
    return Scenarios(symbols, drawn.numpy())


def _read_histories(
    network: TokenNetwork, histories: list[Floats], num_paths: int, days: int
) -> tuple[ContiguousCache, Tensor]:
    """A cache of each name's history, `num_paths` times over, and the hidden state at its end."""
    config = network.decoder.config
    lengths = torch.tensor([len(history) for history in histories])
    longest = int(lengths.max())
    padded = np.stack([np.pad(history, (0, longest - len(history))) for history in histories])
    coarse, fine = (torch.from_numpy(digit) for digit in encode(padded))
    cache = ContiguousCache(config, len(histories), longest + days)
    hidden = network.decoder.trunk(inputs_embeds=network.embed(coarse, fine), cache=cache).hidden_BTD
    copies = ContiguousCache(config, len(histories) * num_paths, longest + days)
    copies.slots = cache.slots.repeat_interleave(num_paths, dim=1)
    copies.lengths = lengths.repeat_interleave(num_paths)
    last = hidden[torch.arange(len(lengths)), lengths - 1]
    return copies, last.repeat_interleave(num_paths, dim=0)


def _advance(network: TokenNetwork, cache: ContiguousCache, coarse: Tensor, fine: Tensor) -> Tensor:
    hidden = network.decoder.trunk(inputs_embeds=network.embed(coarse, fine), cache=cache).hidden_BTD
    cache.advance(1)
    return hidden


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
