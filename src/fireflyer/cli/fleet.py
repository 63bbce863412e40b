"""`fireflyer fleet`: start jobs on a shared cluster at any time, see who runs and why others wait, tend the nodes."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.cli import fleet_simulate
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.fleet.folder import StateFolder

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "fleet",
        help="a shared cluster without approval or cap: equal time slices, nothing lost",
        description="A shared cluster on Slurm, or on plain processes of this machine. Any command is a job: one that"
        " answers TERM by saving and exiting with 75 goes on later by the same command.",
    )
    verbs = parser.add_subparsers(dest="fleet_verb", metavar="VERB", title="verbs", required=True)
    state = argparse.ArgumentParser(add_help=False)
    state.add_argument("--state", metavar="DIR", help="the fleet's folder (default $FIREFLYER_FLEET, or your own)")
    _add_up(verbs, state)
    down = _add(verbs, state, "down", "end the controller; jobs run on, and the next `up` takes them over", _down)
    down.add_argument("--suspend", action="store_true", help="first have all jobs save and stop")
    _add_submit(verbs, state)
    queue = _add(verbs, state, "queue", "who runs, why a job waits, shares, occupancy", _queue)
    queue.add_argument("--json", action="store_true", help="one JSON object on stdout")
    queue.add_argument("--watch", action="store_true", help="a board that stays up to date; Ctrl-C ends it")
    status = _add(verbs, state, "status", "one task: its attempts, why each ended, work kept and lost", _status)
    status.add_argument("task", metavar="TASK", type=int)
    status.add_argument("--json", action="store_true", help="one JSON object on stdout")
    logs = _add(verbs, state, "logs", "a task's output", _logs)
    logs.add_argument("task", metavar="TASK", type=int)
    logs.add_argument("-f", "--follow", action="store_true", help="stay until the task ends")
    logs.add_argument("--rank", type=int, default=0, metavar="R", help="which node's output, by its place (default 0)")
    stop = _add(verbs, state, "stop", "stop a task for good; it saves first", _stop)
    stop.add_argument("task", metavar="TASK", type=int)
    nodes = _add(verbs, state, "nodes", "nodes, who holds them; take one out or back", _nodes)
    change = nodes.add_mutually_exclusive_group()
    change.add_argument("--drain", metavar="NODE", help="no more jobs on it; the one there moves away")
    change.add_argument("--resume", metavar="NODE", help="take it back")
    nodes.add_argument("--reason", default="drained by hand", help="why it is drained")
    nodes.add_argument("--json", action="store_true", help="one JSON array on stdout")
    validate = _add(verbs, state, "validate", "examine nodes; a failing one is drained with the reason", _validate)
    validate.add_argument("--node", metavar="NODE", help="only this one (default all)")
    validate.add_argument("--no-wait", action="store_true", help="don't wait for the verdicts")
    _add_interrupt(verbs)
    what = "a month of a large cluster in a minute, beside other schedulers"
    fleet_simulate.add_arguments(
        _add(verbs, argparse.ArgumentParser(add_help=False), "simulate", what, fleet_simulate.run)
    )


def run(args: argparse.Namespace) -> int:
    command: Callable[[argparse.Namespace], int] = args.fleet_run
    return command(args)


def _add(
    verbs: Any, parent: argparse.ArgumentParser, name: str, what: str, command: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, parents=[parent], help=what, description=what)
    parser.set_defaults(fleet_run=command)
    return parser


def _add_up(verbs: Any, state: argparse.ArgumentParser) -> None:
    up = _add(verbs, state, "up", "start the controller, or take over what an earlier one left", _up)
    up.add_argument("--backend", choices=("local", "slurm"), help="what runs the jobs (default local)")
    up.add_argument(
        "--nodes", type=int, metavar="N", help="local: how many jobs this machine takes at once (default 1)"
    )
    up.add_argument("--zones", type=int, metavar="Z", help="local: zones that the nodes are spread over (default 1)")
    up.add_argument(
        "--node-env",
        action="append",
        metavar="NODE:KEY=VALUE",
        help="local: a variable for the jobs on one node, as n1:CUDA_VISIBLE_DEVICES=0; may be repeated",
    )
    up.add_argument("--partition", metavar="P", help="slurm: the partition (default Slurm's own)")
    up.add_argument("--slice", type=duration, metavar="TIME", help="no job is interrupted before this (default 10m)")
    up.add_argument("--deadline", type=duration, metavar="TIME", help="for saving and stopping (default 30s)")
    up.add_argument("--half-life", type=duration, metavar="TIME", help="of the usage that shares look at (default 1d)")
    up.add_argument(
        "--weight", action="append", metavar="USER=W", help="a user who shall have W times as much; may be repeated"
    )
    up.add_argument("--as-me", action="store_true", help="as root: run all jobs as root, in a fleet of root's alone")
    up.add_argument("--web", type=int, metavar="PORT", help="a page to look at on this port of 127.0.0.1")
    up.add_argument("--foreground", action="store_true", help="stay in this terminal")


def _add_submit(verbs: Any, state: argparse.ArgumentParser) -> None:
    submit = _add(verbs, state, "submit", "hand in a command; it gets its turn, whoever runs", _submit)
    submit.add_argument("--nodes", type=int, default=1, metavar="N", help="whole nodes, all or none (default 1)")
    submit.add_argument("--name", metavar="NAME", help="what to call it (default the command's name)")
    submit.add_argument(
        "--run", metavar="DIR", help="its run folder (default: what the command says after --run or --checkpoint-dir)"
    )
    submit.add_argument(
        "--deadline", type=duration, metavar="TIME", help="for saving and stopping (default the fleet's)"
    )
    submit.add_argument("--limit", type=duration, metavar="TIME", help="a promise to end within this; may start sooner")
    submit.add_argument("--restarts", type=int, default=0, metavar="N", help="after failures of its own (default 0)")
    submit.add_argument("--wait-for-nodes", action="store_true", help="accept more nodes than there are yet")
    submit.add_argument("--for", dest="user", metavar="USER", help="the fleet's owner: whom to charge, and run it as")
    submit.add_argument("--json", action="store_true", help="one JSON object on stdout")
    submit.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")


def _add_interrupt(verbs: Any) -> None:
    what = "run a command, interrupt and resume it as a fleet would; does it survive?"
    parser = _add(verbs, argparse.ArgumentParser(add_help=False), "simulate-interrupt", what, _simulate_interrupt)
    parser.add_argument("--after", type=duration, default=10.0, metavar="TIME", help="interrupt it then (default 10s)")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="so often, then let it end (default 1)")
    parser.add_argument("--deadline", type=duration, default=30.0, metavar="TIME", help="for saving (default 30s)")
    parser.add_argument("--run", metavar="DIR", help="its run folder (default: what the command says after --run)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND ...")


def duration(text: str) -> float:
    """Seconds: 90, 90s, 10m, 2h, 1d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|min|h|d|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a time: give seconds, or 90s, 10m, 2h, 1d")
    return float(match[1]) * _UNITS[match[2]]


def _folder(args: argparse.Namespace) -> StateFolder:
    from fireflyer.fleet.folder import StateFolder, default_folder

    return StateFolder(Path(args.state).absolute() if args.state else default_folder())


def _ask(args: argparse.Namespace, what: str, **arguments: Any) -> Any:
    from fireflyer.fleet.channel import ask

    return ask(_folder(args).socket, what, **arguments)


def _up(args: argparse.Namespace) -> int:
    from fireflyer.fleet.daemon import run_controller, start_controller

    changes = _changes(args)
    if args.foreground:
        run_controller(_folder(args), changes, web_port=args.web, on_ready=lambda line: print(line, flush=True))
        return 0
    options = _options(changes) + (["--web", str(args.web)] if args.web is not None else [])
    known = start_controller(_folder(args), options)
    page = f", http://127.0.0.1:{args.web}/" if args.web else ""
    print(f"{_folder(args).root}: {known['backend']}, {known['nodes']} nodes{page}, pid {known['pid']}")
    return 0


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the fleet's settings; the rest is as it was."""
    given = {
        "backend": args.backend,
        "nodes": args.nodes,
        "zones": args.zones,
        "partition": args.partition,
        "slice_s": args.slice,
        "deadline_s": args.deadline,
        "half_life_s": args.half_life,
        "as_me": args.as_me or None,
        "node_env": _node_env(args.node_env) if args.node_env else None,
        "weights": _weights(args.weight) if args.weight else None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _options(changes: dict[str, Any]) -> list[str]:
    """`_changes` as a command line again."""
    names = {"slice_s": "slice", "deadline_s": "deadline", "half_life_s": "half-life"}
    options: list[str] = []
    for key, value in changes.items():
        if key == "as_me":
            options.append("--as-me")
        elif key == "node_env":
            for node, env in value.items():
                for name, text in env.items():
                    options += ["--node-env", f"{node}:{name}={text}"]
        elif key == "weights":
            for user, weight in value.items():
                options += ["--weight", f"{user}={weight}"]
        else:
            options += [f"--{names.get(key, key)}", str(value)]
    return options


def _node_env(given: list[str]) -> dict[str, dict[str, str]]:
    env: dict[str, dict[str, str]] = {}
    for entry in given:
        match = re.fullmatch(r"([^:=]+):([^=]+)=(.*)", entry, re.DOTALL)
        if match is None:
            raise UserError(f"--node-env {entry!r}: give it as n1:CUDA_VISIBLE_DEVICES=0")
        env.setdefault(match[1], {})[match[2]] = match[3]
    return env


def _weights(given: list[str]) -> dict[str, float]:
    weights = {}
    for entry in given:
        user, _, weight = entry.partition("=")
        try:
            weights[user] = float(weight)
        except ValueError as error:
            raise UserError(f"--weight {entry!r}: give it as alice=2") from error
    return weights


def _down(args: argparse.Namespace) -> int:
    while True:
        answer = _ask(args, "down", suspend=args.suspend)
        if not args.suspend or not answer["running"]:
            break
        time.sleep(0.2)
    _wait_for_end(answer["pid"])
    left = answer["running"]
    print("down" + (f"; jobs that run on: {left}; the next fireflyer fleet up takes them over" if left else ""))
    return 0


def _wait_for_end(pid: int) -> None:
    """Until the controller is gone, so that `down` then `up` works."""
    from fireflyer.fleet.processes import read_process

    until = time.monotonic() + 10
    while (process := read_process(pid)) and process.alive and time.monotonic() < until:
        time.sleep(0.02)


def _command(args: argparse.Namespace) -> list[str]:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UserError(f"no command: give it after --, as in fireflyer fleet {args.fleet_verb} -- python train.py")
    if shutil.which(command[0]) is None:
        place = "in this folder" if "/" in command[0] else "on PATH"
        raise UserError(f"command {command[0]!r} doesn't exist {place}, or isn't executable")
    return command


def _cwd() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError as error:
        raise UserError("this folder doesn't exist any more: submit from one that does") from error


def _run_dir(given: str | None, command: list[str]) -> str | None:
    """The run folder, from our option or the command's own."""
    for place, word in enumerate(command):
        option, equals, value = word.partition("=")
        if given is None and option in ("--run", "--checkpoint-dir"):
            given = value if equals else next(iter(command[place + 1 :]), None)
    return None if given is None else str(Path(_cwd()) / given)


def _submit(args: argparse.Namespace) -> int:
    command = _command(args)
    umask = os.umask(0o077)
    os.umask(umask)
    answer = _ask(
        args,
        "submit",
        key=secrets.token_hex(16),
        user=args.user,
        name=args.name or re.sub(r"[^A-Za-z0-9_.-]", "-", Path(command[0]).name)[:64],
        argv=command,
        cwd=_cwd(),
        env=dict(os.environ),
        umask=umask,
        nodes=args.nodes,
        run_dir=_run_dir(args.run, command),
        deadline_s=args.deadline,
        restarts=args.restarts,
        limit_s=args.limit,
        wait_for_nodes=args.wait_for_nodes,
    )
    if answer["trouble"]:
        print(f"fireflyer: task {answer['task']} is kept until this has passed: {answer['trouble']}", file=sys.stderr)
    print(json.dumps(answer) if args.json else answer["task"])
    return 0


def _queue(args: argparse.Namespace) -> int:
    from fireflyer.cli import fleet_views

    if args.watch:
        fleet_views.watch(lambda: _ask(args, "queue"))
        return 0
    shown = _ask(args, "queue")
    print(json.dumps(shown) if args.json else fleet_views.queue_text(shown))
    return 0


def _status(args: argparse.Namespace) -> int:
    from fireflyer.cli import fleet_views

    shown = _ask(args, "status", task=args.task)
    print(json.dumps(shown) if args.json else fleet_views.status_text(shown))
    return 0


def _logs(args: argparse.Namespace) -> int:
    from fireflyer.cli import fleet_views

    fleet_views.copy_logs(lambda: _ask(args, "status", task=args.task), args.rank, args.follow)
    return 0


def _stop(args: argparse.Namespace) -> int:
    answer = _ask(args, "stop", task=args.task)
    print(f"task {answer['task']}: {answer['state']}")
    return 0


def _nodes(args: argparse.Namespace) -> int:
    from fireflyer.cli import fleet_views

    if args.drain or args.resume:
        _ask(args, "drain", node=args.drain or args.resume, drained=bool(args.drain), reason=args.reason)
    rows = _ask(args, "nodes")
    print(json.dumps(rows) if args.json else fleet_views.nodes_text(rows))
    return 0


def _validate(args: argparse.Namespace) -> int:
    from fireflyer.cli import fleet_views

    tasks: dict[str, int] = _ask(args, "validate", node=args.node)
    if args.no_wait:
        return 0
    for node, task in tasks.items():
        while (shown := _ask(args, "status", task=task))["state"] in ("waiting", "running", "stopping"):
            time.sleep(0.2)
        print(fleet_views.verdict_text(node, shown))
    rows = {row["name"]: row for row in _ask(args, "nodes")}
    bad = [f"{node} ({rows[node]['reason']})" for node in tasks if rows[node]["health"] != "up"]
    if bad:
        raise UserError(f"not in service: {'; '.join(bad)}")
    return 0


def _simulate_interrupt(args: argparse.Namespace) -> int:
    from fireflyer.fleet.interrupt import simulate_interrupt

    command = _command(args)
    report = simulate_interrupt(
        command,
        cwd=Path(_cwd()),
        run_dir=_run_dir(args.run, command),
        after_s=args.after,
        times=args.times,
        deadline_s=args.deadline,
        say=lambda line: print(line, file=sys.stderr if args.json else sys.stdout, flush=True),
    )
    if args.json:
        print(json.dumps(report))
    return 0
