"""`fireflyer convert CHECKPOINT DIR --to bf16`: a checkpoint in another precision; typed again, it goes on."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.checkpoint.convert import Converted

PRECISIONS = ("bf16", "fp32", "fp8", "int8", "int4")


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="write a checkpoint in another precision; the same command again goes on",
        description="Write a checkpoint in another precision, file to file, whatever it weighs. The same command again"
        " goes on where it was stopped.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder, a GGUF file; with --dry-run any CONFIG"
    )
    parser.add_argument("folder", metavar="DIR", help="a folder that doesn't exist yet, is empty, or was begun so")
    parser.add_argument(
        "--to",
        required=True,
        choices=PRECISIONS,
        help="fp8 is the form of the released V3 files, int8 and int4 are packed for CPUs",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="count what would be read and written; names alone will do for it"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    if args.dry_run:
        from fireflyer.cli.convert_view import dry_run, table

        facts = dry_run(args.checkpoint, args.folder, args.to)
        print(json.dumps(facts) if args.json else table(args.checkpoint, facts))
        return 0
    _check_source(args.checkpoint)
    converted = _convert(args)
    if args.json:
        facts = {"tensors": converted.num_tensors, "bytes": converted.num_bytes, "files": converted.num_files}
        print(json.dumps({"folder": str(converted.folder), **facts, "already": converted.already}))
    else:
        print(_sentence(converted, args.to))
    return 0


def _check_source(name: str) -> None:
    from fireflyer.config.files import preset_names

    if name in preset_names() and not Path(name).exists():
        raise UserError(f"{name}: a shape without weights; give the folder that holds them, or --dry-run to count them")


def _convert(args: argparse.Namespace) -> Converted:
    from fireflyer.cli.convert_bar import Bar
    from fireflyer.cli.signals import StopSignals
    from fireflyer.config.sizes import show_bytes

    stop = StopSignals("stopped before anything was written; the same command begins again")
    with stop, Bar(sys.stderr) as bar:
        from fireflyer.checkpoint.convert import prepare, run

        conversion = prepare(args.checkpoint, args.folder, args.to)
        stop.begin()
        if conversion.present_bytes and not conversion.is_done:
            bar.note(f"{args.folder}: {show_bytes(conversion.present_bytes)} are there; going on")
        return run(conversion, bar.on_progress, stop.requested)


def _sentence(converted: Converted, to: str) -> str:
    done = "converted already" if converted.already else "converted"
    files = f"{converted.num_files} file" + ("s" if converted.num_files != 1 else "")
    return (
        f"{converted.folder}: {done} to {to}: {converted.num_tensors:,} tensors, {converted.num_bytes:,} bytes in"
        f" {files}. Now: fireflyer generate {converted.folder} PROMPT"
    )
