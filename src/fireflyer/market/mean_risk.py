"""From scores to what should be held: the portfolio of the best return for its risk, under constraints.

In: one day's scores, the bars up to that day and what is held. Out: shares to buy and to sell, as portfolio.py's. A
score is read as an expected daily return of skill · volatility · standardised score (Grinold's rule); risk is the
shrunken covariance (Ledoit and Wolf) of the last `window` sessions. Solved by skfolio.

Shapes: T sessions of the window · K candidates · N names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fireflyer.errors import UserError
from fireflyer.market.account import Counts
from fireflyer.market.panel import Floats, Mask
from fireflyer.market.portfolio import Decision, best_first
from fireflyer.market.rules import LOT, limit_shares

LEAST_HISTORY = 20
"""Sessions before which no covariance is estimated, and nothing decided."""


@dataclass(frozen=True)
class Bounds:
    """What weights must keep to. least, most: (K,) of each; budget: their sum; turnover: the most of all the changes
    from `before` (K,) together; beta (K,) with the index, and between which two the portfolio's lies, or None."""

    least: Floats
    most: Floats
    budget: float
    before: Floats
    turnover: float
    beta: Floats
    beta_between: tuple[float, float] | None


@dataclass(frozen=True)
class MeanRisk:
    """Every `every` sessions weigh the `candidates` best names and those held. most: of one name, as a share of the
    invested. turnover: sold and bought in one go at most, as a share of the account, unless the other bounds need more.
    beta: the portfolio's with the
    index, between these two, of what is invested; None: whatever it is. A name that closed at its upper limit isn't
    bought, one at its lower isn't sold: tomorrow would most likely refuse both."""

    candidates: int = 60
    every: int = 5
    invested: float = 0.95
    most: float = 0.05
    turnover: float = 0.3
    beta: tuple[float, float] | None = (0.8, 1.2)
    window: int = 120
    skill: float = 0.05
    risk_aversion: float = 5.0

    def __post_init__(self) -> None:
        for key, value, least in (
            ("candidates", self.candidates, 2),
            ("every", self.every, 1),
            ("window", self.window, 20),
        ):
            if value < least:
                raise UserError(f"portfolio.{key} = {value} must be {least} or more")
        for key, share in (("invested", self.invested), ("most", self.most), ("turnover", self.turnover)):
            if not 0 < share <= (2 if key == "turnover" else 1):
                raise UserError(
                    f"portfolio.{key} = {share:g} must lie above 0 and be {2 if key == 'turnover' else 1} at most"
                )
        if self.candidates * self.most < 1:
            raise UserError(
                f"portfolio.most = {self.most:g} of {self.candidates} candidates can't fill the portfolio; give more"
            )
        if self.beta is not None and not self.beta[0] <= self.beta[1]:
            raise UserError(f"portfolio.beta = {self.beta}: the lower bound first")

    def orders(self, decision: Decision) -> tuple[Counts, Floats]:
        """(N,) shares to trade, below 0 to sell, and whom the cash serves first."""
        panel, row, held, price = decision.panel, decision.row, decision.held, decision.price
        priority = np.where(np.isfinite(decision.scores), decision.scores, -np.inf)
        shares = np.zeros(len(held), np.int64)
        left = (held > 0) & ~panel.member[row]
        shares[left] = -held[left]
        returns = self._history(decision)
        names = self._names(decision, np.asarray(np.isfinite(returns).all(axis=0)))
        # Without a bar, a score or a whole history today it can't be weighed, and stays as it is.
        stays = (held > 0) & ~(left & panel.traded[row])
        stays[names] = False
        if len(names) < 2:
            return shares, priority
        value = decision.value_fen / 100
        budget = self.invested - float((price[stays] * held[stays]).sum()) / value
        if budget <= 0:
            return shares, priority
        window = returns[:, names]
        bounds = self._bounds(decision, names, window, budget)
        weights = best_weights(window, decision.scores[names], bounds, self.skill, self.risk_aversion,
                               where=f"{panel.origin.source}: {panel.dates[row]}")  # fmt: skip
        wanted = (weights * value / price[names]).astype(np.int64)
        change = np.where(weights < 1e-4, -held[names], wanted - held[names])
        # Less than a lot isn't worth an order; an account too small for a first one is told so by the rejection.
        change[(np.abs(change) < LOT) & (held[names] > 0) & (change != -held[names])] = 0
        shares[names] = change
        return shares, priority

    def _history(self, decision: Decision) -> Floats:
        """(T, N) daily returns of adjusted prices, 0 while a name was suspended, NaN before its first bar."""
        panel, row = decision.panel, decision.row
        first = max(row - self.window, 0)
        part = panel.slice(first, row + 1)
        returns = part.returns()[1:]
        begun = np.maximum.accumulate(part.traded, axis=0)[:-1]
        return np.where(begun, np.nan_to_num(returns), np.nan)

    def _names(self, decision: Decision, whole: Mask) -> np.ndarray:
        """Columns of those weighed: held ones and the best others, all with scores, bars and a whole window."""
        panel, row = decision.panel, decision.row
        if row < LEAST_HISTORY:
            return np.zeros(0, np.int64)
        fit = np.isfinite(decision.scores) & panel.member[row] & panel.traded[row] & whole
        owned = np.flatnonzero(fit & (decision.held > 0))
        others = best_first(np.flatnonzero(fit & (decision.held == 0)), decision.scores)[: self.candidates]
        return np.sort(np.concatenate([owned, np.array(others, np.int64)]))

    def _bounds(self, decision: Decision, names: np.ndarray, window: Floats, budget: float) -> Bounds:
        panel, row = decision.panel, decision.row
        value = decision.value_fen / 100
        before = decision.price[names] * decision.held[names] / value
        index = panel.index_close[row - len(window) : row + 1]
        market = index[1:] / index[:-1] - 1
        beta = (
            (window - window.mean(0)).T
            @ (market - market.mean())
            / max(float(((market - market.mean()) ** 2).sum()), 1e-18)
        )
        limit = limit_shares(tuple(panel.symbols[name] for name in names.tolist()), panel.dates[row : row + 1])[0]
        with np.errstate(invalid="ignore"):
            up, down = window[-1] >= limit - 1e-3, window[-1] <= -limit + 1e-3
        most = np.maximum(np.full(len(names), self.most * self.invested), 0.0)
        # What grew beyond its bound while held may take this long to come back: as far as the turnover lets it.
        most = np.where(up, np.minimum(most, before), most)
        least = np.where(down, np.minimum(before, most), 0.0)
        turnover = max(self.turnover, abs(budget - float(before.sum())) + self._forced(before, least, most))
        return Bounds(least, most, budget, before, turnover, beta, self.beta)

    def _forced(self, before: Floats, least: Floats, most: Floats) -> float:
        """What the bounds themselves make change, twice over: it must be sold, and the money go elsewhere."""
        return 2 * float(np.maximum(before - most, 0).sum() + np.maximum(least - before, 0).sum())


def best_weights(
    returns: Floats, scores: Floats, bounds: Bounds, skill: float, risk_aversion: float, *, where: str
) -> Floats:
    """(K,) weights of the greatest expected return less risk_aversion times variance, within the bounds.

    returns: (T, K) daily; scores: (K,). Raises UserError, naming `where`, for bounds that nothing meets.
    """
    spread = float(scores.std())
    standard = (scores - scores.mean()) / spread if spread > 0 else np.zeros(len(scores))
    expected = skill * returns.std(axis=0) * standard
    for turnover in (bounds.turnover, 2.0):
        weights = _solved(returns, expected, replace(bounds, turnover=turnover), risk_aversion)
        if weights is not None:
            return np.clip(weights, bounds.least, bounds.most)
    raise UserError(
        f"{where}: no weights meet all bounds (sum {bounds.budget:.2f}, each {bounds.most.max():.3f} at most, beta"
        f" {bounds.beta_between}); widen one"
    )


def _solved(returns: Floats, expected: Floats, bounds: Bounds, risk_aversion: float) -> Floats | None:
    """None where nothing meets the bounds."""
    skfolio, norm1 = _skfolio()
    rows, most = [], []
    if bounds.beta_between is not None:
        low, high = bounds.beta_between
        rows, most = [bounds.beta, -bounds.beta], [high * bounds.budget, -low * bounds.budget]
    problem = skfolio.optimization.MeanRisk(
        objective_function=skfolio.optimization.ObjectiveFunction.MAXIMIZE_UTILITY,
        risk_aversion=risk_aversion,
        prior_estimator=skfolio.prior.EmpiricalPrior(covariance_estimator=skfolio.moments.LedoitWolf()),
        overwrite_expected_return=lambda weights: weights @ expected,
        min_weights=bounds.least,
        max_weights=bounds.most,
        budget=bounds.budget,
        left_inequality=np.array(rows) if rows else None,
        right_inequality=np.array(most) if rows else None,
        add_constraints=lambda weights: norm1(weights - bounds.before) <= bounds.turnover,
    )
    try:
        problem.fit(returns)
    except skfolio.exceptions.SkfolioError:
        return None
    return np.asarray(problem.weights_, np.float64)


def _skfolio():
    try:
        import skfolio
        import skfolio.exceptions
        import skfolio.moments
        import skfolio.optimization
        import skfolio.prior
        from cvxpy import norm1
    except ImportError:
        raise UserError("a mean-risk portfolio needs skfolio: pip install 'fireflyer[market]'") from None
    return skfolio, norm1
