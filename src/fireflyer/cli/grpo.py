"""`fireflyer grpo`: reinforcement learning on rewards that can be checked; typed again, it goes on."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from fireflyer.cli.post_training import add_arguments, add_env_argument
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.train.settings import Recipe
    from fireflyer.train.summary import Summary

PRESET = "grpo"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "grpo",
        help="improve a model's answers by rewards that can be checked",
        description="Reinforcement learning (GRPO): the model answers problems in groups, graders judge the answers,"
        " and what was better than the rest of its group becomes more likely. The same command again goes on.",
    )
    add_arguments(parser, PRESET, example="grpo.group_size=8", data=False)
    add_env_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.train.recipe import load_recipe

    if args.init_from is None:
        raise UserError("no model to begin from: fireflyer grpo --from CHECKPOINT --env NAME|FILE --run DIR")
    overrides = list(args.overrides)
    if args.env is not None:
        overrides.append(f"grpo.environment={json.dumps(args.env)}")
    recipe = load_recipe(args.recipe, overrides, init_from=args.init_from, base=PRESET)
    if args.dry_run:
        from fireflyer.cli.dry_run import describe, plan

        facts = plan(recipe)
        print(json.dumps(facts) if args.json else describe(facts))
        return 0
    run_dir = args.run or f"runs/{PRESET}"
    summary = _train(recipe, run_dir, args.json)
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"run_dir": run_dir, **asdict(summary)}))
    return 0


def _train(recipe: Recipe, run_dir: str, json_on_stdout: bool) -> Summary:
    from fireflyer.cli.grpo_view import GrpoProgress
    from fireflyer.cli.signals import StopSignals

    stream = sys.stderr if json_on_stdout else sys.stdout
    with StopSignals() as stop, GrpoProgress(stream, run_dir) as progress:
        from fireflyer.train.events import Event
        from fireflyer.train.grpo_run import open_grpo
        from fireflyer.train.loop import train

        def on_event(event: Event) -> None:
            stop.on_event(event)
            progress.on_event(event)

        return train(recipe, run_dir, opener=open_grpo, on_event=on_event, should_stop=stop.requested)
