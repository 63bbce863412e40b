"""`fireflyer market trade --paper`: book the sessions that have come in since the last time."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from fireflyer.cli.market_backtest import YUAN, add_rules, settings_of
from fireflyer.cli.market_train import RUN
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.market.engine import Day


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser = subparsers.add_parser(
        "trade",
        help="on paper, day by day: the sessions that have come in, each booked once in a ledger",
        description="Decide and book every session that the bars have and the ledger has not. Run it after each close:"
        " the decisions are the backtest's, and a run that is killed goes on after the last session booked.",
    )
    add_source(parser)
    parser.add_argument(
        "--paper", action="store_true", help="on paper: nothing is sent anywhere; there is no other way"
    )
    parser.add_argument("--scores", metavar="FILE", help="date, symbol, score as CSV or Parquet; default the study's")
    parser.add_argument("--run", metavar="DIR", default=RUN, help=f"a study of market train (default {RUN})")
    parser.add_argument(
        "--ledger", metavar="FILE", default="runs/paper/ledger.sqlite", help="default runs/paper/ledger.sqlite"
    )
    parser.add_argument("--start", metavar="DATE", help="the first session of a new ledger (default the first scored)")
    add_rules(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.cli.market_source import open_source
    from fireflyer.market.paper import trade_on_paper
    from fireflyer.market.scores import read_scores

    if not args.paper:
        raise UserError("market trade sends nothing to a broker; say --paper to keep a ledger of what it would do")
    settings = settings_of(args)
    panel = open_source(args.data)
    if args.scores:
        scores = read_scores(args.scores, panel)
    else:
        from fireflyer.market.study import Study

        scores = Study.load(args.run).scores(panel)
    last: dict[str, Day] = {}

    def on_day(date: str, day: Day) -> None:
        last.clear()
        last[date] = day
        if not args.json:
            print(told(date, day), flush=True)

    booked = trade_on_paper(panel, scores, settings, args.ledger, start=args.start, on_day=on_day)
    if args.json:
        orders = [(order.symbol, order.shares) for day in last.values() for order in day.orders]
        print(json.dumps({"ledger": args.ledger, "booked": booked, "orders_for_the_next_session": orders}))
        return 0
    if not booked:
        print(f"{args.ledger}: nothing new; the bars end on {panel.dates[-1]}")
    for day in last.values():
        for order in day.orders:
            print(f"  next session: {'buy' if order.shares > 0 else 'sell'} {abs(order.shares):,} {order.symbol}")
    return 0


def told(date: str, day: Day) -> str:
    """One session in a line."""
    nav = (day.cash + day.holdings + day.futures) / YUAN
    text = f"{date}  {nav:,.2f} yuan, cash {day.cash / YUAN:,.2f}; {len(day.fills)} fills, fees {day.fees / YUAN:,.2f}"
    return text + (f", {len(day.rejections)} not filled" if day.rejections else "")
