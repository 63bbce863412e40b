"""`fireflyer market backtest`: scores traded through a panel, day by day, and audited."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fireflyer.cli.market_train import RUN
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.market.engine import BacktestResult, BacktestSettings
    from fireflyer.market.mean_risk import MeanRisk
    from fireflyer.market.panel import Panel
    from fireflyer.market.portfolio import TopK

YUAN = 100
"""Fen."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser = subparsers.add_parser(
        "backtest",
        help="trade scores day by day under the exchanges' rules: net result, fees, rejections, audit",
        description="Trade scores through the bars: decided at the close, filled on the next session, under T+1, price"
        " limits, suspensions, lots and dated fees. Four of the audit's tests are run on the result.",
    )
    add_source(parser)
    parser.add_argument("--scores", metavar="FILE", help="date, symbol, score as CSV or Parquet; default the study's")
    parser.add_argument("--run", metavar="DIR", default=RUN, help=f"a study of market train (default {RUN})")
    add_rules(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def add_rules(parser: argparse.ArgumentParser) -> None:
    """How the account is run; the same words for a backtest and on paper."""
    parser.add_argument(
        "--mode", default="long-only", help="long-only (default), 'index enhancement' or market-neutral"
    )
    parser.add_argument("--cash", metavar="YUAN", type=float, default=10_000_000, help="to begin with (default 10M)")
    parser.add_argument(
        "--portfolio", default="top", help="top (default): the K best, alike; mean-risk: the best return for its risk"
    )
    parser.add_argument("--names", metavar="K", type=int, default=50, help="held, or weighed, at a time (default 50)")
    parser.add_argument("--drop", metavar="N", type=int, default=5, help="changed at a time at most (default 5)")
    parser.add_argument(
        "--every", metavar="DAYS", type=int, help="sessions between decisions (default 1; of mean-risk 5)"
    )
    parser.add_argument(
        "--turnover", metavar="SHARE", type=float, default=0.3, help="of mean-risk, a decision (default 0.3)"
    )
    parser.add_argument("--fill", default="close", help="price of the next session: close (default), open or vwap")
    parser.add_argument("--commission-bp", metavar="BP", type=float, default=2.5, help="both ways (default 2.5)")
    parser.add_argument("--future", default="IC", help="what market-neutral sells: IF, IH, IC (default) or IM")


def settings_of(args: argparse.Namespace) -> BacktestSettings:
    """The account's settings out of the words. Raises UserError."""
    from fireflyer.market.engine import BacktestSettings
    from fireflyer.market.rules import Fees

    if args.commission_bp < 0:
        raise UserError(f"--commission-bp {args.commission_bp:g}: a fee is 0 or more")
    return BacktestSettings(
        cash_fen=round(args.cash * YUAN),
        mode=args.mode,
        portfolio=_portfolio(args),
        fees=Fees(commission_bp=args.commission_bp),
        fill=args.fill,
        future=args.future,
    )


def _portfolio(args: argparse.Namespace) -> TopK | MeanRisk:
    from fireflyer.market.mean_risk import MeanRisk
    from fireflyer.market.portfolio import TopK

    if args.portfolio == "top":
        return TopK(names=args.names, drop=args.drop, every=1 if args.every is None else args.every)
    if args.portfolio == "mean-risk":
        return MeanRisk(candidates=args.names, turnover=args.turnover, every=5 if args.every is None else args.every)
    raise UserError(f"--portfolio {args.portfolio}: unknown; give top or mean-risk")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.cli.market_source import open_source
    from fireflyer.market.audit import audit_result
    from fireflyer.market.engine import backtest, why_nothing
    from fireflyer.market.scores import read_scores

    settings = settings_of(args)
    panel = open_source(args.data)
    if args.scores:
        scores = read_scores(args.scores, panel)
    else:
        from fireflyer.market.study import Study

        scores = Study.load(args.run).scores(panel)
    first = first_scored(panel, scores)
    panel, scores = panel.slice(first, len(panel.dates)), scores[first:]
    result = backtest(panel, scores, settings)
    if reason := why_nothing(result):
        raise UserError(reason)
    audit = audit_result(panel, scores, result, 5)
    facts = summarised(panel, result) | {"audit": audit.verdict(), "audit_passed": not audit.failed}
    print(json.dumps(facts) if args.json else "\n".join(told(facts)))
    return 0


def first_scored(panel: Panel, scores: Any) -> int:
    """The first session with a score; what lies before it is no part of a result. Raises UserError without any."""
    import numpy as np

    scored = np.isfinite(scores).any(axis=1)
    if not scored.any():
        raise UserError(f"no score on any session of {panel.origin.source}, {panel.dates[0]} to {panel.dates[-1]}")
    return int(np.argmax(scored))


def summarised(panel: Panel, result: BacktestResult) -> dict[str, Any]:
    """The result in numbers."""
    from fireflyer.market.statistics import annual_return, sharpe, worst_drawdown

    returns = result.returns()
    index = panel.index_close / panel.index_close[0]
    index_daily = index[1:] / index[:-1] - 1
    rejected: dict[str, int] = {}
    for rejection in result.rejections:
        rejected[rejection.reason] = rejected.get(rejection.reason, 0) + 1
    gross = returns + result.fees / result.nav
    return {
        "first": str(result.dates[0]),
        "last": str(result.dates[-1]),
        "begun_with": int(result.nav[0]) / YUAN,
        "ended_with": int(result.nav[-1]) / YUAN,
        "annual_net": annual_return(returns[1:]),
        "annual_gross": annual_return(gross[1:]),
        "annual_index": annual_return(index_daily),
        "sharpe_net": sharpe(returns[1:]),
        "worst_drawdown": worst_drawdown(result.nav).depth,
        "turnover_a_session": float(result.turnover()[1:].mean()) if len(returns) > 1 else 0.0,
        "fees": int(result.fees.sum()) / YUAN,
        "orders": len(result.orders),
        "fills": len(result.fills),
        "rejected": rejected,
        "order_hash": result.order_hash,
        "universe": panel.origin.universe,
        "nominal_prices": panel.origin.nominal_prices,
    }


def told(facts: dict[str, Any]) -> list[str]:
    """The result for people."""
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(facts["rejected"].items())) or "none"
    lines = [
        f"{facts['first']} to {facts['last']}: {facts['begun_with']:,.2f} became {facts['ended_with']:,.2f} yuan",
        f"a year      {facts['annual_net']:+.1%} net, {facts['annual_gross']:+.1%} before fees,"
        f" {facts['annual_index']:+.1%} the index",
        f"Sharpe      {facts['sharpe_net']:.2f} net; worst drawdown {abs(facts['worst_drawdown']):.1%}",
        f"turnover    {facts['turnover_a_session']:.1%} a session; fees {facts['fees']:,.2f} yuan",
        f"orders      {facts['orders']:,}, fills {facts['fills']:,}; not filled: {rejected}",
        f"order hash  {facts['order_hash'][:16]}",
        f"universe    {facts['universe']}" + ("; nominal prices from 10.00" if facts["nominal_prices"] else ""),
        f"audit       {facts['audit']}",
    ]
    return lines
