"""`fireflyer distill TEACHER STUDENT`: a student learns what a teacher answers right; typed again, it goes on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.cli.post_training import add_env_argument, add_run_arguments
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.train.lessons import Counts
    from fireflyer.train.settings import Recipe
    from fireflyer.train.summary import Summary

PRESET = "distill"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "distill",
        help="teach a model what a better one answers right",
        description="Distillation by rejection sampling: the teacher answers problems, graders keep what is right, the"
        " student learns it. The same command again goes on, in the asking as in the learning.",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="a checkpoint that answers")
    parser.add_argument("student", metavar="STUDENT", help="the checkpoint that learns; it stays as it is")
    add_env_argument(parser)
    add_run_arguments(parser, PRESET, example="distill.samples=8")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.train.recipe import load_recipe

    for checkpoint in (args.teacher, args.student):
        if not Path(checkpoint).exists():
            raise UserError(f"{checkpoint}: no such folder; fireflyer distill TEACHER STUDENT takes two checkpoints")
    overrides = [*args.overrides, f"distill.teacher={json.dumps(args.teacher)}"]
    if args.env is not None:
        overrides.append(f"distill.environment={json.dumps(args.env)}")
    recipe = load_recipe(args.recipe, overrides, init_from=args.student, base=PRESET)
    if args.dry_run:
        from fireflyer.cli.dry_run import describe, plan

        facts = plan(recipe)
        print(json.dumps(facts) if args.json else f"{_asking(recipe)}\n{describe(facts)}")
        return 0
    run_dir = args.run or f"runs/{PRESET}"
    summary, counts = _distill(recipe, run_dir, args.json)
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"run_dir": run_dir, **asdict(summary), "distill": asdict(counts)}))
    return 0


def _asking(recipe: Recipe) -> str:
    from fireflyer.train.distill import distill_settings

    settings = distill_settings(recipe)
    tokens = settings.problems * settings.samples * settings.max_answer_tokens
    return (
        f"the teacher answers {settings.problems:,} problems {settings.samples} times each: {tokens:,} tokens at most;"
        f" {settings.keep} right answers to each are learnt at most"
    )


def _distill(recipe: Recipe, run_dir: str, json_on_stdout: bool) -> tuple[Summary, Counts]:
    from fireflyer.cli.progress import Progress
    from fireflyer.cli.signals import StopSignals

    with StopSignals() as stop, Progress(sys.stderr if json_on_stdout else sys.stdout) as progress:
        from fireflyer.train.distill import distill
        from fireflyer.train.teacher import Gathered

        def on_event(event: Any) -> None:
            if isinstance(event, Gathered):
                stop.begin()
                line = _gathered(event)
                progress.show(event.problems, event.total, line, "", line)
            else:
                stop.on_event(event)
                progress.on_event(event)

        return distill(recipe, run_dir, on_event=on_event, should_stop=stop.requested)


def _gathered(event: Any) -> str:
    parts = [f"asked {event.problems:,} of {event.total:,} problems"]
    if event.answers:
        parts.append(f"{event.right:,} of {event.answers:,} answers right")
    if event.tokens_per_s is not None:
        parts.append(f"{event.tokens_per_s:,.0f} tok/s")
    return "  ".join(parts)
