"""`fireflyer launch -n N VERB ...`: one command on N ranks of a machine, or of each of several, by torch's launcher."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fireflyer.errors import RankLost, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from fireflyer.parallel.layout import Layout
    from fireflyer.train.settings import Recipe

SHARED_OUT = ("pretrain", "extend", "sft")
"""Verbs whose work several ranks can share, whether `fireflyer launch` or torchrun starts them."""

LAUNCHED = "FIREFLYER_LAUNCHED"
"""Set for ranks whose launcher tells what ended them."""

_LOST = 3
"""Exit code of a rank that can't go on without another."""

_SAVE_S = 600
"""How long ranks that are asked to stop have for it."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "launch",
        help="run a training command on several ranks",
        description="Start the ranks of a run: fireflyer launch -n 2 pretrain --data TEXT --run DIR. [parallel] in the"
        " recipe says how they share the work; by itself they share out the batch. One line tells how it ended.",
    )
    parser.add_argument("-n", dest="num", type=int, metavar="N", required=True, help="ranks on this machine")
    parser.add_argument("--nodes", type=int, default=1, metavar="K", help="machines, each of which runs this command")
    parser.add_argument("--meet", metavar="HOST:PORT", help="with --nodes: where they meet, on one of them")
    parser.add_argument("--port", type=int, metavar="P", help="where ranks of one machine meet (default: a free port)")
    parser.add_argument("--dry-run", action="store_true", help="show which rank would hold what; start nothing")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="VERB ...", help=", ".join(SHARED_OUT))


def run(args: argparse.Namespace) -> int:
    """Do it: the ranks' exit code."""
    if not args.command or args.command[0] not in SHARED_OUT:
        said = f"fireflyer {args.command[0]} runs in one process" if args.command else "no command for the ranks"
        raise UserError(f"{said}; ranks can share {', '.join(SHARED_OUT)}: fireflyer launch -n 2 pretrain ...")
    for option, number in (("-n", args.num), ("--nodes", args.nodes)):
        if number < 1:
            raise UserError(f"{option} {number}: at least 1")
    if (args.nodes > 1) != (args.meet is not None):
        raise UserError("--nodes and --meet HOST:PORT go together; one machine needs neither")
    from fireflyer.train.layout import layout_of

    recipe, as_json = _read(args.command)
    layout = layout_of(recipe, args.num * args.nodes)  # what every rank would refuse is refused before any is started
    if args.dry_run or "--dry-run" in args.command:
        _show(recipe, layout, as_json)
        return 0
    if args.port is not None:
        _check_free(args.port)
    with TemporaryDirectory(prefix="fireflyer-launch-") as folder:
        return _launch(args, Path(folder))


def _read(command: list[str]) -> tuple[Recipe, bool]:
    """The recipe that a command asks for, and whether JSON."""
    from fireflyer.cli import post_training, pretrain
    from fireflyer.cli.main import parse

    verb, args = parse(command)
    return pretrain.recipe_of(args) if verb == "pretrain" else post_training.recipe_of(args, verb), args.json


def _show(recipe: Recipe, layout: Layout, as_json: bool) -> None:
    from fireflyer.cli.dry_run import describe, plan
    from fireflyer.parallel.holdings import describe_holdings, holdings
    from fireflyer.parallel.stages import plan_stages

    parallel = recipe.parallel
    stages = plan_stages(recipe.model, parallel.schedule if layout.pp > 1 else "1f1b", layout.pp, parallel.stages)
    held = holdings(layout, recipe.model, stages)
    facts = plan(recipe)
    if as_json:
        print(json.dumps({**facts, "ranks": [holding.facts() for holding in held]}))
    else:
        print(describe(facts), describe_holdings(layout, held), sep="\n\n")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port} can't be had ({error}); give another, or leave it out") from error


def _launch(args: argparse.Namespace, folder: Path) -> int:
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # what ended the ranks is told below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.num)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_S))
    os.environ[LAUNCHED] = "1"
    logs, codes = folder / "logs", folder / "codes"
    logs.mkdir()
    codes.mkdir()
    config = LaunchConfig(
        min_nodes=args.nodes,
        max_nodes=args.nodes,
        nproc_per_node=args.num,
        run_id="fireflyer",
        rdzv_backend="c10d",
        rdzv_endpoint=args.meet or f"127.0.0.1:{args.port or 0}",
        local_addr=None if args.meet else "127.0.0.1",
        max_restarts=0,
        # Ranks but the first say nothing, unless they fail.
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=dict.fromkeys(range(1, args.num), Std.ALL)),
    )
    try:
        elastic_launch(config, _rank)(args.command, str(codes))
    except ChildFailedError as error:
        return _code(codes, 1) if len(list(codes.iterdir())) == args.num else _tell(error, logs)
    except SignalException as stop:
        return _code(codes, 128 + stop.sigval)
    return _code(codes, 1)


def _rank(command: list[str], codes: str) -> None:
    """One rank's process."""
    os.setsid()  # a terminal's Ctrl-C reaches the launcher, which passes it on, once
    from fireflyer.cli.main import main

    try:
        code = main(command)
    except RankLost:
        sys.exit(_LOST)
    if code not in (0, 2, 75):
        sys.exit(code)  # a failure, for which the launcher ends the others too
    (Path(codes) / os.environ["RANK"]).write_text(str(code))
    # Here torch has a rank wait until its launcher has read what it returned, which one that was stopped never does.
    leave = threading.Timer(1.0, os._exit, (code,))
    leave.daemon = True
    leave.start()


def _code(codes: Path, otherwise: int) -> int:
    """The ranks' exit code: the lowest rank's of this machine."""
    found = sorted(codes.iterdir(), key=lambda path: int(path.name))
    return int(found[0].read_text()) if found else otherwise


def _tell(error: ChildFailedError, logs: Path) -> int:
    """Say which rank ended the others, and how. A first rank's traceback has been seen already."""
    killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    culprits = [rank for rank, number in sorted(killed.items()) if number != signal.SIGTERM]
    if culprits:
        name = signal.Signals(killed[culprits[0]]).name
        hint = " (as the system does when memory runs out)" if name == "SIGKILL" else ""
        print(
            f"fireflyer: rank {culprits[0]} was ended by {name}{hint}, and all stopped; the same command goes on from"
            " the last save",
            file=sys.stderr,
        )
        return 1
    for path in sorted(logs.rglob("stderr.log")):
        text = path.read_text(errors="replace")
        if "Traceback" in text:
            print(text.rstrip(), file=sys.stderr)
            print(
                f"fireflyer: rank {path.parent.name} failed; this is a bug in fireflyer; please report it with the"
                " lines above",
                file=sys.stderr,
            )
            return 1
    if all(failure.exitcode in (_LOST, -signal.SIGTERM) for failure in error.failures.values()):
        print(
            "fireflyer: a rank stopped answering, and all stopped; the same command goes on from the last save",
            file=sys.stderr,
        )
    return 1
