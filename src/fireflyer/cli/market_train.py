"""`fireflyer market train`: a model for each walk-forward fold; typed again, it goes on."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fireflyer.market.recipe import MarketRecipe
    from fireflyer.market.study import Study

RUN = "runs/market"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser = subparsers.add_parser(
        "train",
        help="train a decoder for each walk-forward fold; the same command again goes on",
        description="Train a decoder on bars, one for each walk-forward fold. What it learns from ends, with purge and"
        " embargo, before what it is tested on begins. The same command again goes on where the run stopped.",
    )
    add_source(parser)
    parser.add_argument("--run", metavar="DIR", default=RUN, help=f"the study's folder (default {RUN})")
    parser.add_argument("--recipe", metavar="FILE", help="a recipe (.toml); default the shipped one, market")
    parser.add_argument("--test-from", metavar="DATE", help="the first session tested (default as early as data allow)")
    parser.add_argument("--test-until", metavar="DATE", help="the last session tested (default the last there is)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a setting, as --set steps=100, --set market.train_months=18 or --set market.front_end=tokens",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end; progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.cli.market_source import open_source
    from fireflyer.market.recipe import load_market_recipe
    from fireflyer.market.study import study_folds

    recipe = load_market_recipe(args.recipe, args.overrides)
    panel = open_source(args.data)
    folds = study_folds(panel, recipe.market, test_from=args.test_from, test_until=args.test_until)
    study = _train(panel, folds, recipe, args)
    models = [model.record["tested"] | {"learned": model.record["learned"]} for model in study.models]
    if args.json:
        print(json.dumps({"run_dir": args.run, "folds": models}))
    else:
        what = f"scores: fireflyer market predict --run {args.run} --out scores.csv"
        if recipe.market.front_end == "tokens":
            what = f"scenarios: fireflyer market forecast SYMBOL --scenarios {args.run}"
        print(f"{args.run}: folds trained: {len(models)}. Now, for {what}")
    return 0


def _train(panel: Any, folds: Any, recipe: MarketRecipe, args: argparse.Namespace) -> Study:
    from fireflyer.cli.progress import Progress
    from fireflyer.cli.signals import StopSignals
    from fireflyer.market.study import train_study
    from fireflyer.train.events import Finished

    stream = sys.stderr if args.json else sys.stdout
    with StopSignals() as stop, Progress(stream) as progress:

        def on_event(event: Any) -> None:
            stop.on_event(event)
            if isinstance(event, Finished):  # the line for text runs says how to chat with it
                progress.note(f"{event.run_dir}: {'trained already' if event.already else 'trained'}")
            else:
                progress.on_event(event)

        return train_study(panel, folds, recipe, args.run, on_event=on_event, should_stop=stop.requested)
