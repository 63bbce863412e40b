"""From scores to what should be held: the k best names, of which at most n are changed at a time.

In: one day's scores and what is held. Out: shares to buy and to sell, decided at the close, to be filled a day later.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fireflyer.errors import UserError
from fireflyer.market.account import Counts
from fireflyer.market.panel import Floats, Panel


@dataclass(frozen=True)
class Decision:
    """What is known at the close of `row`, of N names.

    panel: read up to `row`. scores: (N,), NaN for names that can't be bought. held: (N,) shares. price: (N,) last
    closes in yuan, NaN where there was none. value_fen: of the whole account.
    """

    panel: Panel
    row: int
    scores: Floats
    held: Counts
    price: Floats
    value_fen: int


@dataclass(frozen=True)
class TopK:
    """Hold the `names` best, equally much of each when bought; every `every` sessions sell at most the `drop` worst
    that others have overtaken, and buy as many. invested: share of the account's value that may be in stocks."""

    names: int = 50
    drop: int = 5
    every: int = 1
    invested: float = 0.95

    def __post_init__(self) -> None:
        for key, value, least in (("names", self.names, 1), ("drop", self.drop, 1), ("every", self.every, 1)):
            if value < least:
                raise UserError(f"portfolio.{key} = {value} must be {least} or more")
        if not 0 < self.invested <= 1:
            raise UserError(f"portfolio.invested = {self.invested:g} must lie above 0 and be 1 at most")

    def orders(self, decision: Decision) -> tuple[Counts, Floats]:
        """(N,) shares to trade, below 0 to sell, and whom the cash serves first. What left the universe is sold."""
        scores, held, price = decision.scores, decision.held, decision.price
        member = decision.panel.member[decision.row]
        shares = np.zeros(len(scores), np.int64)
        owned = held > 0
        left = owned & ~member
        shares[left] = -held[left]
        kept = np.nonzero(owned & member)[0]
        known = np.isfinite(scores) & member
        ranked = best_first(np.nonzero(known & ~owned)[0], scores)
        room = max(self.names - len(kept), 0)
        # Of those held and the best not held, the worst go; a name without a score today can't be judged, and stays.
        judged = kept[np.isfinite(scores[kept])]
        candidates = ranked[: self.drop + room]
        places = max(self.names - (len(kept) - len(judged)), 0)
        chosen = set(best_first(np.concatenate([judged, np.array(candidates, np.int64)]), scores)[:places])
        overtaken = [name for name in best_first(judged, scores)[::-1] if name not in chosen][: self.drop]
        shares[overtaken] = -held[overtaken]
        bought = [name for name in ranked[: len(overtaken) + room] if np.isfinite(price[name])]
        each = decision.value_fen / 100 * self.invested / self.names
        # One share at least, so that an account that is too small for a lot is told so by the rejection.
        shares[bought] = np.maximum(each / price[bought], 1).astype(np.int64)
        return shares, np.where(np.isfinite(scores), scores, -np.inf)


def best_first(names: np.ndarray, scores: Floats) -> list[int]:
    """By score, the best first; equal ones by their place."""
    return names[np.lexsort((names, -scores[names]))].tolist()
