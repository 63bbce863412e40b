"""`fireflyer demo`: a whole DeepSeek-V3 in small learns arithmetic, is examined, and hands in its bill."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

Summary = TypeVar("Summary")

DEFAULT_RUN, HARD_RUN = "runs/demo", "runs/demo-hard"


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="train a small DeepSeek-V3 on arithmetic, examine it, print the receipt",
        description="Train a small but whole DeepSeek-V3 on sums and differences with written-out working, score 1,000"
        " problems it never saw, and print what it cost. The same command again goes on where it stopped.",
    )
    parser.add_argument(
        "--run", metavar="DIR", help=f"the run's folder (default {DEFAULT_RUN}, with --hard {HARD_RUN})"
    )
    parser.add_argument(
        "--reason",
        action="store_true",
        help="go on from there, into DIR-reason: teach it to think, then harder problems by reinforcement learning",
    )
    parser.add_argument(
        "--hard",
        action="store_true",
        help="products and mixed expressions too, scored by kind and on longer numbers than it was trained on",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and held-out problems (default 0)")
    parser.add_argument(
        "--usd-per-hour", type=float, metavar="X", help="price of this machine (default 0.10, about two cloud cores)"
    )
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object; progress on stderr")


def run(args: argparse.Namespace) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from fireflyer.demo.bill import USD_PER_HOUR
    from fireflyer.demo.hard import hard_receipt, run_hard
    from fireflyer.demo.receipt import receipt
    from fireflyer.demo.run import run_demo

    usd_per_hour = USD_PER_HOUR if args.usd_per_hour is None else args.usd_per_hour
    if not 0 <= usd_per_hour < float("inf"):
        raise UserError(f"--usd-per-hour {usd_per_hour}: give the machine's price as a number from 0 up")
    if args.hard and args.reason:
        raise UserError("--hard and --reason are two demos, in folders of their own; leave one of them out")
    run_dir = Path(args.run or (HARD_RUN if args.hard else DEFAULT_RUN))
    if args.hard:
        summary = _shown(args, run_hard, run_dir, usd_per_hour)
        lines = hard_receipt(summary, run_dir)
    else:
        summary = _shown(args, run_demo, run_dir, usd_per_hour)
        lines = receipt(summary, run_dir)
    if args.reason:
        return _reason(args, run_dir)
    if args.json:
        print(json.dumps({"run_dir": str(run_dir), **asdict(summary)}))
    else:
        print("\n" + "\n".join(lines))
    return 0


def _shown(args: argparse.Namespace, demo: Callable[..., Summary], run_dir: Path, usd_per_hour: float) -> Summary:
    """`run_demo` or `run_hard`, with its progress drawn."""
    from fireflyer.cli.progress import Progress
    from fireflyer.cli.signals import StopSignals
    from fireflyer.demo.examination import Scoring
    from fireflyer.train.events import Finished

    with StopSignals() as stop, Progress(sys.stderr if args.json else sys.stdout, usd_per_hour) as progress:

        def on_event(event: Any) -> None:
            if isinstance(event, Scoring):
                progress.note(f"held-out problems: {event.correct:,} right of {event.done:,}, {event.total:,} in all")
            elif isinstance(event, Finished):
                progress.note("this demo is finished already" if event.already else "trained; now the examination")
            else:
                stop.on_event(event)
                progress.on_event(event)

        return demo(run_dir, seed=args.seed, usd_per_hour=usd_per_hour, on_event=on_event, should_stop=stop.requested)


def _reason(args: argparse.Namespace, demo: Path) -> int:
    from dataclasses import asdict

    from fireflyer.checkpoint.run import write_text
    from fireflyer.cli.grpo_view import GrpoProgress
    from fireflyer.cli.signals import StopSignals
    from fireflyer.demo.reason import GRPO, Stage, run_reason
    from fireflyer.demo.reason_report import curve_svg, reason_lines
    from fireflyer.train.events import Finished

    folder = demo.with_name(f"{demo.name}-reason")
    stream = sys.stderr if args.json else sys.stdout
    with StopSignals() as stop, GrpoProgress(stream, folder / GRPO) as progress:

        def on_event(event: Any) -> None:
            if isinstance(event, Stage):
                progress.note(event.text)
            elif not isinstance(event, Finished):
                stop.on_event(event)
                progress.on_event(event)

        summary = run_reason(folder, demo, seed=args.seed, on_event=on_event, should_stop=stop.requested)
    write_text(folder / "curve.svg", curve_svg(summary))
    if args.json:
        print(json.dumps({"run_dir": str(folder), **asdict(summary)}))
    else:
        print("\n" + "\n".join(reason_lines(summary, folder)))
    return 0
