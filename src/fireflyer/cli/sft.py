"""`fireflyer sft`: teach a checkpoint to answer, from chats; typed again, it goes on."""

from __future__ import annotations

import argparse

from fireflyer.cli.post_training import add_arguments, run_post_training


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "sft",
        help="teach a model to answer, from chats",
        description="Supervised fine-tuning on JSONL lines with messages (OpenAI's form, tools and reasoning_content"
        " too), or with prompt and completion. Only what the assistant says is learnt. The same command again goes on.",
    )
    add_arguments(parser, "sft", example="epochs=3")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.train.sft import open_chats

    return run_post_training(args, "sft", open_chats)
