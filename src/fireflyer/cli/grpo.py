"""`fireflyer grpo`: reinforcement learning on rewards that can be checked; typed again, it goes on."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

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
    parser.add_argument("--from", dest="init_from", metavar="CHECKPOINT", help="the model to begin from")
    parser.add_argument(
        "--env",
        metavar="NAME|FILE",
        help="problems: a data set of reasoning-gym by name, a .jsonl of problem and answer, or a .py with PROBLEMS and"
        " grade(problem, answer)",
    )
    parser.add_argument("--recipe", metavar="CONFIG", help=f"a recipe (.toml) on top of the shipped one, {PRESET}")
    parser.add_argument("--run", metavar="DIR", default=f"runs/{PRESET}", help=f"its folder (default runs/{PRESET})")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a setting of the recipe, as --set grpo.group_size=8 or --set schedule.lr=1e-6; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the schedule and size; build and read nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end; progress on stderr")


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
    summary = _train(recipe, args.run, args.json)
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"run_dir": args.run, **asdict(summary)}))
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
