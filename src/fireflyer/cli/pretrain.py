"""`fireflyer pretrain`: train a recipe on text, from random weights or a checkpoint; typed again, it goes on."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.train.settings import Recipe


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "pretrain",
        help="train a model on your text; the same command again goes on",
        description="Train a model on text. The same command again goes on where the run stopped, whatever stopped it.",
    )
    parser.add_argument(
        "--recipe",
        metavar="CONFIG",
        help="a recipe (.toml), a shipped one (ember, the default, or deepseek-v3), or a model shape",
    )
    parser.add_argument(
        "--data",
        metavar="PATH[:WEIGHT]",
        nargs="+",
        action="extend",
        help="files or folders (.txt .md .py .jsonl .parquet), builtin:stdlib or builtin:arithmetic; may be repeated",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; without it one is trained on the data")
    parser.add_argument(
        "--from", dest="init_from", metavar="CHECKPOINT", help="go on from these weights: continued pretraining"
    )
    parser.add_argument(
        "--size",
        metavar="10M",
        help="total parameters: width, depth, experts, learning rate, batch and tokens follow from it",
    )
    parser.add_argument(
        "--run",
        metavar="DIR",
        help="the run's folder: checkpoints, metrics, recipe (default runs/ and the recipe's name)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="change a setting of the recipe, as --set steps=2000 or --set schedule.lr=1e-3; may be repeated",
    )
    parser.add_argument(
        "--encoding-errors",
        choices=("strict", "replace"),
        help="what to do where a file isn't UTF-8: refuse it (default) or put U+FFFD there",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the run's schedule and size; build and read nothing"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end; progress on stderr")


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What the options ask for. Raises UserError."""
    from fireflyer.train.recipe import load_recipe

    return load_recipe(
        args.recipe,
        args.overrides,
        sources=args.data,
        tokenizer=args.tokenizer,
        init_from=args.init_from,
        encoding_errors=args.encoding_errors,
        size=args.size,
    )


def run(args: argparse.Namespace) -> int:
    from fireflyer.cli.post_training import train_shown
    from fireflyer.parallel.started import together

    recipe = together(lambda: recipe_of(args))
    if args.dry_run:
        from fireflyer.cli.dry_run import describe, plan

        facts = plan(recipe)
        print(json.dumps(facts) if args.json else describe(facts))
        return 0
    if not recipe.data.sources:
        raise UserError("no data: give --data PATH (files or folders of text), or --data builtin:stdlib to try it")
    run_dir = args.run or _default_run(args.recipe or args.init_from, args.size)
    summary = train_shown(recipe, run_dir, None, args.json)
    if args.json:
        from dataclasses import asdict

        print(json.dumps({"run_dir": run_dir, **asdict(summary)}))
    return 0


def _default_run(config: str | None, size: str | None) -> str:
    """runs/NAME, after the recipe, the model shape or the checkpoint, and the size that was asked for."""
    from pathlib import Path

    from fireflyer.train.recipe import DEFAULT_RECIPE

    path = Path(config or DEFAULT_RECIPE).resolve()
    name = path.stem if path.suffix in (".toml", ".json") else path.name
    return str(Path("runs") / (name if size is None else f"{name}-{size}"))
