"""`fireflyer market report RUN`: a study as one HTML page, its audit at the head."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fireflyer.cli.market_backtest import add_rules, settings_of
from fireflyer.cli.market_train import RUN
from fireflyer.errors import UserError


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="a study as one HTML page: beside the index, Ridge and LightGBM, with the audit's verdict",
        description="Score, trade and audit a study, and write one HTML file that needs nothing else.",
    )
    parser.add_argument("run", metavar="RUN", nargs="?", default=RUN, help=f"a study of market train (default {RUN})")
    add_source(parser)
    parser.add_argument("--out", metavar="FILE", help="the HTML file (default RUN/report.html)")
    parser.add_argument(
        "--trials", metavar="N", type=int, help="strategies tried in all (default: the shipped recipe's)"
    )
    parser.add_argument(
        "--dates", metavar="N", type=int, default=50, help="dates of the audit's first test (default 50)"
    )
    add_rules(parser)


def run(args: argparse.Namespace) -> int:
    """Do it; prints what was written."""
    from pathlib import Path

    from fireflyer.cli.market_source import open_source
    from fireflyer.market.appraisal import appraise
    from fireflyer.market.demo import REPORT, write_report
    from fireflyer.market.study import Study
    from fireflyer.market.trials import NUM_TRIALS

    if args.dates < 1 or (args.trials is not None and args.trials < 1):
        raise UserError("--dates and --trials are 1 or more")
    settings = settings_of(args)
    study, panel = Study.load(args.run), open_source(args.data)
    found = appraise(panel, study, settings, trials=args.trials or NUM_TRIALS, audit_dates=args.dates, on_part=_say)
    path = Path(args.out or Path(args.run) / REPORT)
    write_report(found, path, Path(args.run).resolve().name)
    print(path)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
