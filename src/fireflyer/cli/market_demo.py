"""`fireflyer market demo`: the whole desk once, on real A-shares, into one page."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from fireflyer.cli.market_train import RUN

if TYPE_CHECKING:
    from fireflyer.market.panel import Panel
    from fireflyer.market.recipe import MarketRecipe

MADE_UP_RUN = "runs/market-synthetic"


def add_parser(subparsers: Any) -> None:
    """Add the verb."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="the whole desk on real A-shares: two folds, traded, audited, one HTML page",
        description="Train the decoder on two walk-forward folds of real A-shares, trade its scores beside those of"
        " Ridge and LightGBM, run the audit and write the report. The same command again goes on where it stopped.",
    )
    parser.add_argument("--synthetic", action="store_true", help="a made-up market, where the real bars aren't here")
    parser.add_argument("--run", metavar="DIR", help=f"the folder (default {RUN}, with --synthetic {MADE_UP_RUN})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[], help="change a setting"
    )
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object; progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from pathlib import Path

    from fireflyer.cli.market_source import ASHARES, MADE_UP, open_source
    from fireflyer.market.recipe import load_market_recipe

    recipe = load_market_recipe(None, [f"seed={args.seed}", *args.overrides])
    panel = open_source(MADE_UP if args.synthetic else ASHARES)
    facts = _shown(args, panel, recipe, Path(args.run or (MADE_UP_RUN if args.synthetic else RUN)))
    print(json.dumps(facts) if args.json else "\n".join(described(facts)))
    return 0


def _shown(args: argparse.Namespace, panel: Panel, recipe: MarketRecipe, run_dir: Any) -> dict[str, Any]:
    from fireflyer.cli.progress import Progress
    from fireflyer.cli.signals import StopSignals
    from fireflyer.market.demo import run_demo
    from fireflyer.train.events import Finished

    with StopSignals() as stop, Progress(sys.stderr if args.json else sys.stdout) as progress:

        def on_event(event: Any) -> None:
            if isinstance(event, Finished):
                stop.begin()
                progress.note(f"{event.run_dir}: {'trained already' if event.already else 'trained'}")
            else:
                stop.on_event(event)
                progress.on_event(event)

        return run_demo(panel, recipe, run_dir, on_event=on_event, on_part=progress.note, should_stop=stop.requested)


def described(facts: dict[str, Any]) -> list[str]:
    """The summary for people: what it stands on first, then the figures."""
    first, last = facts["tested"]
    lines = [
        "",
        f"{facts['source']}; universe {facts['universe']}; tested {first} to {last}",
        f"costs: {facts['costs']}",
        f"audit: {facts['audit']}; {facts['trials']} trials counted",
        "",
        f"{'':<20}{'RankIC':>16}{'in s.e.':>9}{'gross':>9}{'net':>9}{'index':>9}{'drawdown':>10}{'deflated':>10}",
    ]
    for name, one in facts["models"].items():
        rank = one["rank_ic"]
        lines.append(
            f"{name:<20}{rank['mean']:>8.3f} ± {rank['standard_error']:.3f}{rank['t']:>9.1f}{one['gross']:>+9.1%}"
            f"{one['net']:>+9.1%}{one['index']:>+9.1%}{one['drawdown']:>10.1%}"
            f"{one['deflated_sharpe']['probability']:>10.0%}"
        )
    return [*lines, "", f"{facts['report']}"]
