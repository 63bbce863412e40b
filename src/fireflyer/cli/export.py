"""`fireflyer export CHECKPOINT DIR`: a checkpoint in the published format, streamed file to file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fireflyer.errors import UserError

if TYPE_CHECKING:
    import torch


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint in the published format",
        description="Write a checkpoint (of a run: its newest good one) to a new folder in the published format, which"
        " transformers and the engines load. The same checkpoint gives the same bytes.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder")
    parser.add_argument("folder", metavar="DIR", help="a folder that doesn't exist yet or is empty")
    parser.add_argument(
        "--merge-adapter", action="store_true", help="CHECKPOINT is an adapter (a run with [lora]): add it to its base"
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights that the run kept (ema.decay)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="default: as stored; FP8 becomes bf16. Gate biases stay fp32"
    )


def run(args: argparse.Namespace) -> int:
    """Do it; prints what was written."""
    from fireflyer.checkpoint.hf import save_published
    from fireflyer.checkpoint.published import open_checkpoint, open_ema

    if args.merge_adapter:
        return _merge(args)
    checkpoint = open_checkpoint(args.checkpoint)
    if args.ema:
        checkpoint = open_ema(checkpoint)
    save_published(
        args.folder,
        checkpoint.config,
        checkpoint.tensors,
        dtype=_dtype(args.dtype),
        tokenizer_from=checkpoint.folder,
    )
    what = "averaged weights" if args.ema else "weights"
    print(f"{args.folder}: {what} of {checkpoint.folder}, {len(checkpoint.tensors):,} tensors")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from fireflyer.checkpoint.adapter import adapted, open_adapter
    from fireflyer.checkpoint.hf import save_published
    from fireflyer.checkpoint.published import open_checkpoint

    if args.ema:
        raise UserError("--ema: adapters have no averaged weights; leave it out")
    adapter = open_adapter(args.checkpoint)
    checkpoint = adapted(open_checkpoint(adapter.base), adapter)
    tokenizer_from = adapter.folder if (adapter.folder / "tokenizer.json").is_file() else checkpoint.folder
    dtype = _dtype(args.dtype)
    save_published(args.folder, checkpoint.config, checkpoint.tensors, dtype=dtype, tokenizer_from=tokenizer_from)
    print(f"{args.folder}: weights of {checkpoint.folder} with the adapter {adapter.folder} added")
    return 0


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[name]
