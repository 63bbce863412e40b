"""`fireflyer dpo`: teach a checkpoint which of two answers is preferred; typed again, it goes on."""

from __future__ import annotations

import argparse

from fireflyer.cli.post_training import add_arguments, run_post_training


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "dpo",
        help="teach a model which of two answers is preferred",
        description="Direct preference optimisation on JSONL lines with prompt, chosen and rejected: three texts, or"
        " messages. The same command again goes on.",
    )
    add_arguments(parser, "dpo", example="epochs=3")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.train.dpo import open_preferences

    return run_post_training(args, "dpo", open_preferences)
