"""The `fireflyer` command: argv to one verb, and every outcome to an exit code and at most one line on stderr.

Exit codes: 0 done, 2 the user's mistake, 75 stopped and saved, 130 interrupted, 141 the reader of our output went away,
1 our bug (with a traceback). Verbs import torch and pydantic only once they run.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from fireflyer import __version__
from fireflyer.cli import (
    bench,
    chat,
    convert,
    demo,
    distill,
    dpo,
    eval,
    export,
    extend,
    fleet,
    generate,
    grpo,
    inspect,
    launch,
    market,
    plan,
    pretrain,
    report,
    serve,
    sft,
)
from fireflyer.cli.launch import LAUNCHED, SHARED_OUT
from fireflyer.errors import RankLost, Stopped, UserError
from fireflyer.parallel.started import is_first_rank, world_size

VERBS = {
    "demo": demo,
    "pretrain": pretrain,
    "extend": extend,
    "sft": sft,
    "grpo": grpo,
    "dpo": dpo,
    "distill": distill,
    "export": export,
    "convert": convert,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "eval": eval,
    "bench": bench,
    "report": report,
    "inspect": inspect,
    "plan": plan,
    "launch": launch,
    "market": market,
    "fleet": fleet,
}


class _Answered(Exception):
    """The command line was answered while it was read."""


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors. No abbreviated options: a later option would change what they mean."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _Answered  # argparse's own end of --help and --version; `error` never comes here

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def options(self) -> list[str]:
        return list(self._option_string_actions)

    def refuse(self, argument: str) -> NoReturn:
        """An argument that nothing reads, with the nearest option."""
        close = get_close_matches(argument.partition("=")[0], self.options(), n=1)
        self.error(f"unknown argument {argument}" + (f"; did you mean {close[0]}?" if close else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` without the program's name, sys.argv's by default. Returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" and goes on
    if not is_first_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the first rank speaks for all
    _shorten_spinning()
    try:
        code = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _say(str(error), 2)
    except Stopped as stop:
        return _say(str(stop) or "stopped and saved; the same command goes on from there", 75)
    except RankLost as error:
        if LAUNCHED in os.environ:
            raise  # the launcher tells it, and knows more
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        # What is still buffered goes nowhere, or the interpreter would complain while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        traceback.print_exc()
        return _say("this is a bug in fireflyer; please report it with the lines above", 1)


def _run(argv: Sequence[str]) -> int:
    try:
        verb, args = parse(argv)
    except _Answered:
        return 0
    if world_size() > 1 and verb not in SHARED_OUT:
        raise UserError(f"fireflyer {verb} runs in one process; ranks can share {', '.join(SHARED_OUT)}")
    return VERBS[verb].run(args)


def parse(argv: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The verb, and its options."""
    parser = Parser(
        prog="fireflyer",
        description="DeepSeek-V3 end to end: train it from random weights, resume, export, generate, count its cost.",
        epilog="Start with: fireflyer demo",
    )
    parser.add_argument("--version", action="version", version=f"fireflyer {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for module in VERBS.values():
        module.add_parser(subparsers)
    if not argv:
        parser.print_help()
        raise _Answered
    if argv[0] not in VERBS and argv[0] not in parser.options():
        close = get_close_matches(argv[0], [*VERBS, *parser.options()], n=1)
        guess = f"; did you mean {close[0]}?" if close else "."
        raise UserError(f"unknown verb {argv[0]!r}{guess} Verbs: {', '.join(VERBS)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        subparsers.choices[args.verb].refuse(unknown[0])
    return args.verb, args


def _shorten_spinning() -> None:
    """Let torch's threads sleep sooner where they wait for one another; the user's own settings stay.

    By default they spin for so long that any other busy process takes most of a run's speed (benchmarks/contention.py).
    The OpenMP library reads this once, when torch loads it, so it must be set before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _say(message: str, code: int) -> int:
    line = " ".join(message.splitlines())
    if is_first_rank():  # what stops one rank of several is told to all of them
        print(f"fireflyer: {line}", file=sys.stderr)
    return code
