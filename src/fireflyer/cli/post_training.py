"""What the verbs of post-training share: their options, and a run that begins from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.train.settings import Recipe
    from fireflyer.train.setup import InputsOpener
    from fireflyer.train.summary import Summary


def add_arguments(
    parser: argparse.ArgumentParser, preset: str, *, example: str, data: bool = True, files: str = ".jsonl files"
) -> None:
    """Where a run begins and what it reads, then `add_run_arguments`. data: whether it learns from `files`."""
    parser.add_argument("--from", dest="init_from", metavar="CHECKPOINT", help="the model to begin from")
    if data:
        parser.add_argument("--data", metavar="FILE", nargs="+", action="extend", help=f"{files}; may be repeated")
    add_run_arguments(parser, preset, example)


def add_env_argument(parser: argparse.ArgumentParser) -> None:
    """Where problems come from."""
    parser.add_argument(
        "--env",
        metavar="NAME|FILE",
        help="problems: a data set of reasoning-gym by name, a .jsonl of problem and answer, or a .py with PROBLEMS and"
        " grade(problem, answer)",
    )


def add_run_arguments(parser: argparse.ArgumentParser, preset: str, example: str) -> None:
    """The options that every verb of post-training has. example: a setting."""
    parser.add_argument("--recipe", metavar="CONFIG", help=f"a recipe (.toml) on top of the shipped one, {preset}")
    parser.add_argument("--run", metavar="DIR", help=f"the run's folder (default runs/{preset})")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help=f"change a setting of the recipe, as --set {example} or --set schedule.lr=1e-5; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the schedule and size; build and read nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end; progress on stderr")


def recipe_of(args: argparse.Namespace, preset: str) -> Recipe:
    """What the options ask for. Raises UserError."""
    from fireflyer.train.recipe import load_recipe

    if args.init_from is None:
        raise UserError(f"no model to begin from: fireflyer {preset} --from CHECKPOINT --data FILE --run DIR")
    return load_recipe(args.recipe, args.overrides, sources=args.data, init_from=args.init_from, base=preset)


def run_post_training(args: argparse.Namespace, preset: str, opener: InputsOpener) -> int:
    """Train, or go on. Raises UserError."""
    from fireflyer.parallel.started import together

    recipe = together(lambda: recipe_of(args, preset))
    if args.dry_run:
        from fireflyer.cli.dry_run import describe, plan

        facts = plan(recipe)
        print(json.dumps(facts) if args.json else describe(facts))
        return 0
    run_dir = args.run or f"runs/{preset}"
    summary = train_shown(recipe, run_dir, opener, args.json)
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"run_dir": run_dir, **asdict(summary)}))
    return 0


def train_shown(recipe: Recipe, run_dir: str, opener: InputsOpener | None, json_on_stdout: bool) -> Summary:
    """`train` with its progress drawn, by the first rank of several; Ctrl-C and SIGTERM stop and save."""
    from fireflyer.cli.progress import Progress
    from fireflyer.cli.signals import StopSignals

    with StopSignals() as stop, Progress(sys.stderr if json_on_stdout else sys.stdout) as progress:
        from fireflyer.parallel.started import is_first_rank
        from fireflyer.train.events import Event
        from fireflyer.train.loop import train

        def on_event(event: Event) -> None:
            stop.on_event(event)
            if is_first_rank():
                progress.on_event(event)

        return train(recipe, run_dir, opener=opener, on_event=on_event, should_stop=stop.requested)
