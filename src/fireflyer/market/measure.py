"""One signal measured: its coefficients, how long it lasts, and what trading it left, gross and net.

In: a panel, scores and the settings of a backtest, over the sessions of the test. Out: `Measured`, and its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fireflyer.market.engine import BacktestResult, BacktestSettings, backtest
from fireflyer.market.features import Floats, forward_returns
from fireflyer.market.panel import Panel
from fireflyer.market.statistics import (
    Coefficient,
    DeflatedSharpe,
    annual_return,
    coefficient,
    daily_ic,
    deflated_sharpe,
    sharpe,
    worst_drawdown,
)

HORIZONS = (1, 2, 5, 10, 20)
"""Sessions over which a signal's decay is looked at."""


@dataclass(frozen=True)
class Measured:
    """rank_ic, ic: over the signal's horizon. daily: (D,) the sessions' RankIC. decay: RankIC at `HORIZONS`.

    Returns are a year's, compounded; sharpe is of the net returns, information_ratio of those over the index's.
    turnover: a session's, one way, as a share of the account.
    """

    name: str
    rank_ic: Coefficient
    ic: Coefficient
    daily: Floats
    decay: tuple[Coefficient, ...]
    gross: float
    net: float
    index: float
    sharpe: float
    information_ratio: float
    deflated: DeflatedSharpe
    drawdown: float
    turnover: float
    fees_yuan: float
    result: BacktestResult

    def figures(self) -> dict[str, Any]:
        """As plain numbers."""
        kept = ("gross", "net", "index", "sharpe", "information_ratio", "drawdown", "turnover", "fees_yuan")
        return {
            "rank_ic": {**asdict(self.rank_ic), "t": self.rank_ic.t},
            "ic": {**asdict(self.ic), "t": self.ic.t},
            "decay": {str(h): asdict(c) for h, c in zip(HORIZONS, self.decay, strict=True)},
            "deflated_sharpe": asdict(self.deflated),
            "rejected": rejected(self.result),
            "fills": len(self.result.fills),
            "order_hash": self.result.order_hash,
            **{name: getattr(self, name) for name in kept},
        }


def measure(
    name: str, panel: Panel, scores: Floats, test: slice, settings: BacktestSettings, horizon: int, trials: int
) -> Measured:
    """Coefficients against the returns of the whole panel; traded over the sessions `test` alone.

    scores: (D, N). trials: how many strategies were tried in all before this one was chosen.
    """
    within = np.full_like(scores, np.nan)
    within[test] = scores[test]
    daily = {h: daily_ic(within, forward_returns(panel, h)) for h in dict.fromkeys((horizon, *HORIZONS))}
    part = panel.slice(test.start, test.stop)
    result = backtest(part, scores[test], settings)
    net = result.returns()[1:]
    gross = net + result.fees[1:] / result.nav[:-1]
    index = part.index_returns()[1:]
    return Measured(
        name=name,
        rank_ic=coefficient(daily[horizon], horizon),
        ic=coefficient(daily_ic(within, forward_returns(panel, horizon), rank=False), horizon),
        daily=daily[horizon],
        decay=tuple(coefficient(daily[h], h) for h in HORIZONS),
        gross=annual_return(gross),
        net=annual_return(net),
        index=annual_return(index),
        sharpe=sharpe(net),
        information_ratio=sharpe(net - index),
        deflated=deflated_sharpe(net, trials),
        drawdown=worst_drawdown(result.nav).depth,
        turnover=float(result.turnover()[1:].mean()),
        fees_yuan=float(result.fees.sum()) / 100,
        result=result,
    )


def rejected(result: BacktestResult) -> dict[str, int]:
    """Orders that weren't filled, by reason, the most frequent first."""
    counts: dict[str, int] = {}
    for rejection in result.rejections:
        counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def cost_regime(settings: BacktestSettings, panel: Panel) -> str:
    """In words, for the head of a report."""
    fees = settings.fees
    duty = (
        "0.10 % stamp duty on sales, 0.05 % from 2023-08-28"
        if fees.stamp_duty_bp is None
        else f"{fees.stamp_duty_bp / 100:.2f} % stamp duty on sales"
    )
    nominal = "; nominal prices from 10.00" if panel.origin.nominal_prices else ""
    return (
        f"{fees.commission_bp:g} bp commission, {fees.minimum_fen / 100:.2f} yuan at least; {duty}; no slippage; filled"
        f" at the next session's {settings.fill}{nominal}"
    )


def by_rows(daily: Floats, spans: Sequence[slice], horizon: int) -> list[Coefficient]:
    """Coefficients of the folds: of a daily series (D,), those of each span."""
    return [coefficient(daily[span], horizon) for span in spans]
