"""`fireflyer market audit`: nine tests that look for leaks, and nine planted leaks that show that they find them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fireflyer.cli.market_backtest import add_rules, settings_of
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.market.audit import Finding, Pipeline
    from fireflyer.market.panel import Panel

ALL = "all"


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser: argparse.ArgumentParser = subparsers.add_parser(
        "audit",
        help="nine tests for leaks of the future, each shown to fail by a planted leak",
        description="Look for the ways in which a backtest comes to know the future: in features, scores, orders,"
        " folds, fills and universe. Exit code 0 where all nine tests pass, 2 where one fails. With --plant a known"
        " leak is put in first, and must be found.",
    )
    add_source(parser)
    parser.add_argument(
        "--run", metavar="DIR", help="a study of market train (default: Ridge on price features, fitted here)"
    )
    parser.add_argument("--plant", metavar="LEAK", help=f"put this leak in first, or {ALL} nine one after another")
    parser.add_argument("--dates", metavar="N", type=int, default=50, help="dates whose future is changed (default 50)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of dates and shuffles (default 0)")
    add_rules(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.cli.market_source import open_source
    from fireflyer.market.audit import audit
    from fireflyer.market.plants import PLANTS

    if args.plant not in (None, ALL, *PLANTS):
        raise UserError(f"--plant {args.plant}: no such leak; there are {', '.join(PLANTS)}, or {ALL}")
    if args.dates < 1 or args.seed < 0:
        raise UserError("--dates is 1 or more, --seed 0 or more")
    panel = open_source(args.data)
    pipeline = _pipeline(panel, args)
    if args.plant:
        return _planted(pipeline, panel, args)
    found = audit(pipeline, panel, seed=args.seed, dates=args.dates, on_finding=None if args.json else _say)
    if args.json:
        print(json.dumps({"passed": found.passed, "findings": [asdict(finding) for finding in found.findings]}))
    else:
        print(found.verdict())
    return 0 if found.passed else 2


def _pipeline(panel: Panel, args: argparse.Namespace) -> Pipeline:
    from fireflyer.market.pipelines import RidgePipeline, StudyPipeline
    from fireflyer.market.recipe import load_market_recipe
    from fireflyer.market.study import Study, study_folds

    settings = settings_of(args)
    if args.run is not None:
        return StudyPipeline(Study.load(args.run), settings)
    market = load_market_recipe().market
    return RidgePipeline.fit(panel, study_folds(panel, market), market.signal_horizon, settings)


def _planted(pipeline: Pipeline, panel: Panel, args: argparse.Namespace) -> int:
    """Each leak before the test that must catch it; 0 where every one was caught."""
    from fireflyer.market.audit import audit
    from fireflyer.market.plants import PLANTS

    names = list(PLANTS) if args.plant == ALL else [args.plant]
    caught = {}
    for name in names:
        kind, test = PLANTS[name]
        finding = audit(kind(pipeline), panel, only=(test,), seed=args.seed, dates=args.dates).findings[0]
        caught[name] = not finding.passed
        if not args.json:
            print(f"{name:<22}{'caught' if caught[name] else 'MISSED':<8}{test}: {finding.detail}", flush=True)
    if args.json:
        print(json.dumps({"caught": caught}))
    else:
        print(f"{sum(caught.values())} of {len(caught)} planted leaks caught")
    return 0 if all(caught.values()) else 2


def _say(finding: Finding) -> None:
    print(f"{'ok' if finding.passed else 'LEAK':<6}{finding.test:<17}{finding.detail}", flush=True)
