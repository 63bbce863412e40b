"""`fireflyer extend`: teach a checkpoint longer texts, by YaRN in phases; typed again, it goes on."""

from __future__ import annotations

import argparse

from fireflyer.cli.post_training import add_arguments, run_post_training


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "extend",
        help="teach a model longer texts: YaRN, in phases",
        description="Extend a model's context as DeepSeek-V3's was: YaRN, then training on sequences of 32K and 128K"
        " tokens; other lengths, batches and steps by --set extend.phases=[...]. The same command again goes on.",
    )
    add_arguments(parser, "extend", example="extend.original=256", files="files or folders of text")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.train.setup import open_inputs

    return run_post_training(args, "extend", open_inputs)
