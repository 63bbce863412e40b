"""`fireflyer market`: a research desk in small; bars in, forecasts, trades on paper and an audited report out."""

from __future__ import annotations

import argparse
from typing import Any

from fireflyer.cli import (
    market_audit,
    market_backtest,
    market_data,
    market_demo,
    market_forecast,
    market_predict,
    market_report,
    market_trade,
    market_train,
)
from fireflyer.errors import UserError

_VERBS = (
    market_demo,
    market_data,
    market_train,
    market_predict,
    market_backtest,
    market_audit,
    market_report,
    market_forecast,
    market_trade,
)

_EXTRA = ("exchange_calendars", "index_constitution", "lightgbm", "pandas", "pyarrow", "skfolio", "sklearn")


def add_parser(subparsers: Any) -> None:
    """Add the verb and those below it."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "market",
        help="price modelling on the same decoder: walk-forward, traded on paper, audited for leaks",
        description="A research desk in small. The decoder reads bars in place of words and ranks the names of a day;"
        " folds walk forward, trading keeps the exchanges' rules, and nine tests look for leaks.",
    )
    verbs = parser.add_subparsers(dest="market_verb", metavar="VERB", title="verbs", required=True)
    for module in _VERBS:
        before = set(verbs.choices)
        module.add_parser(verbs)
        (name,) = verbs.choices.keys() - before
        verbs.choices[name].set_defaults(market_run=module.run)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    try:
        return args.market_run(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        raise UserError(f"fireflyer market needs {package}: pip install 'fireflyer[market]'") from error
