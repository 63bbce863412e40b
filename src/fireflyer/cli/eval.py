"""`fireflyer eval CHECKPOINT --tasks a,b`: scores with their intervals, and everything they were made from."""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.errors import Stopped, UserError

if TYPE_CHECKING:
    from fireflyer.evaluate.evaluation import Progress
    from fireflyer.evaluate.prepare import Asked, Prepared
    from fireflyer.infer.llm import LLM
    from fireflyer.text.tokenizer import Tokenizer

_PACKAGES = ("torch", "tokenizers", "math-verify")
_PLAIN_EVERY_S = 10.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "eval",
        help="score a checkpoint on benchmarks in local files",
        description="Score a checkpoint. Each score has a 95% interval; prompts, answers, settings and hashes are kept "
        "in a folder. The same command again goes on where it stopped.",
    )
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a checkpoint or run folder")
    parser.add_argument(
        "--tasks", metavar="A,B", help="what to score, as arithmetic (no file needed) or gsm8k; --list names them all"
    )
    parser.add_argument("--list", action="store_true", help="name the tasks and their files, and do nothing else")
    parser.add_argument(
        "--data", action="append", default=[], metavar="[TASK=]PATH", help="a task's file; may be given several times"
    )
    parser.add_argument(
        "--examples", action="append", default=[], metavar="[TASK=]PATH", help="a file to take few-shot examples from"
    )
    parser.add_argument("--shots", type=int, metavar="N", help="examples before each problem; default: the task's")
    parser.add_argument("--lengths", default="", metavar="N,N", help="for needle; default: 1024,2048,4096 tokens")
    parser.add_argument(
        "--needles", type=int, default=1, metavar="N", help="for needle: at each length and depth; default: %(default)s"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each task")
    parser.add_argument(
        "--grader",
        metavar="NAME|FILE.py",
        help="for `problems`: exact, number, choice, math, code, or grade() in a file",
    )
    parser.add_argument(
        "--prompt", choices=("auto", "chat", "plain"), default="auto", help="default: chat for a model that was taught"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: evals/ and a name that follows from it all")
    _add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--protocol", choices=("v3", "r1"), help="sampling as in that report; options below change it")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; default: the task's, 0")
    parser.add_argument("--top-p", type=float, metavar="P", help="default: 1")
    parser.add_argument("--samples", type=int, metavar="N", help="answers a problem; default: 1")
    parser.add_argument("--k", default="", metavar="K,K", help="also pass@K and maj@K")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer; default: the task's")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, metavar="B", help="answers at once; default: %(default)s")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="pack the weights on the way in")
    parser.add_argument("--adapter", metavar="PATH", help="a LoRA adapter to add to the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.evaluate.tasks import TASKS, find_task

    if args.list:
        print("\n".join(f"{task.name:<15} {task.what}" for task in TASKS.values()))
        return 0
    if args.checkpoint is None:
        raise UserError("name the checkpoint to score: fireflyer eval CHECKPOINT --tasks A,B")
    names = list(dict.fromkeys(name.strip() for name in (args.tasks or "").split(",") if name.strip()))
    if not names:
        raise UserError(f"name what to score with --tasks; there are {', '.join(TASKS)}")
    tasks = [find_task(name) for name in names]
    asked = _asked(args, names)
    from fireflyer.checkpoint.hf import load_tokenizer, resolve_checkpoint
    from fireflyer.evaluate.prepare import prepare

    folder = resolve_checkpoint(args.checkpoint)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer.json, without which no text can be asked; put it beside")
    prepared = [prepare(task, asked, tokenizer) for task in tasks]
    settings = _settings(args, folder, prepared, tokenizer)
    results = _evaluate(args, prepared, settings, tokenizer)
    print(json.dumps(results) if args.json else _table(results))
    return 0


def _asked(args: argparse.Namespace, names: Sequence[str]) -> Asked:
    from fireflyer.evaluate.prepare import Asked

    for name, least in (
        ("samples", 1),
        ("max_tokens", 1),
        ("limit", 1),
        ("shots", 0),
        ("batch", 1),
        ("seed", 0),
        ("needles", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if args.seed >= 2**31:
        raise UserError(f"--seed is {args.seed}; it must be below 2^31")
    if args.lengths and "needle" not in names:
        raise UserError(f"--lengths {args.lengths} is for the task needle; leave it out")
    if args.needles != 1 and "needle" not in names:
        raise UserError(f"--needles {args.needles} is for the task needle; leave it out")
    if args.grader is not None and "problems" not in names:
        raise UserError(f"--grader {args.grader} is for the task problems; the others have their own")
    return Asked(
        protocol=args.protocol,
        temperature=args.temperature,
        top_p=args.top_p,
        samples=args.samples,
        max_tokens=args.max_tokens,
        ks=_whole_numbers("--k", args.k),
        lengths=_whole_numbers("--lengths", args.lengths) or (1024, 2048, 4096),
        needles=args.needles,
        seed=args.seed,
        problem_seed=_problem_seed(Path(args.checkpoint)),
        limit=args.limit,
        shots=args.shots,
        prompt=args.prompt,
        grader=args.grader,
        data=_paths("--data", args.data, names),
        examples=_paths("--examples", args.examples, names),
    )


def _problem_seed(checkpoint: Path) -> int:
    """The seed of the run that a checkpoint comes from, where its recipe is there: it says what was held out."""
    from fireflyer.checkpoint.run_folder import RECIPE
    from fireflyer.config.files import read_toml

    recipe = next((path / RECIPE for path in (checkpoint, *checkpoint.parents[:2]) if (path / RECIPE).is_file()), None)
    return 0 if recipe is None else int(read_toml(recipe).get("seed", 0))


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"{option} is {text!r}; it must be whole numbers, as 8,64")
    return tuple(sorted({int(part) for part in parts}))


def _paths(option: str, given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """By task; a path alone is for the one task that reads files."""
    from fireflyer.evaluate.tasks import TASKS

    found: dict[str, Path] = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if not equals or name not in TASKS:
            readers = [name for name in names if name not in ("arithmetic", "needle")] or ["needle"]
            if len(readers) != 1:
                raise UserError(f"{option} {entry}: say which task it is for, as {option} TASK=PATH")
            name, path = readers[0], entry
        if name not in names:
            raise UserError(f"{option} {entry}: {name} is not among --tasks {','.join(names)}")
        if name in found:
            raise UserError(f"{option} {entry}: {name} has {found[name]} already; one file or folder each")
        if not Path(path).exists():
            raise UserError(f"{option} {entry}: no such file or folder")
        found[name] = Path(path)
    return found


def _settings(
    args: argparse.Namespace, folder: Path, prepared: Sequence[Prepared], tokenizer: Tokenizer
) -> dict[str, Any]:
    """All that the scores depend on. Batch and device are left out: they change speed, and bits by rounding alone."""
    from fireflyer.evaluate.identity import checkpoint_identity, data_identity, software
    from fireflyer.evaluate.prepare import template_settings
    from fireflyer.evaluate.sandbox import confinement

    adapter = None if args.adapter is None else {"path": args.adapter, "sha256": data_identity(Path(args.adapter))}
    settings: dict[str, Any] = {
        "checkpoint": checkpoint_identity(folder),
        "adapter": adapter,
        "quantization": args.quantization,
        "seed": args.seed,
        "protocol": args.protocol,
        "tasks": {each.task.name: each.settings for each in prepared},
        "chat_template": template_settings(tokenizer),
        "software": software(_PACKAGES),
    }
    if any(each.task.grader == "code" for each in prepared):
        settings["confinement"] = confinement()
    return settings


def _evaluate(
    args: argparse.Namespace, prepared: Sequence[Prepared], settings: Mapping[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    from fireflyer.evaluate.records import EvaluationFolder, finished_results

    out = args.out or Path("evals") / _name(args.checkpoint, prepared, settings)
    done = finished_results(out, settings)
    if done is not None:
        print(f"{out}: evaluated already; another --seed or --out evaluates again", file=sys.stderr)
        return done
    from fireflyer.evaluate.evaluation import evaluate_task
    from fireflyer.evaluate.graders import Graders

    with ExitStack() as stack:
        graders = stack.enter_context(Graders())
        for each in prepared:
            if each.task.grader not in ("", "arithmetic"):
                graders.get(each.task.grader)
        llm = _load(args)
        _check_room(llm, prepared)
        folder = EvaluationFolder(out, settings)
        stack.callback(folder.close)
        stack.enter_context(_stoppable(out))
        progress = _Line()
        results = {
            "out": str(out),
            "checkpoint": settings["checkpoint"],
            "seed": args.seed,
            "tasks": {
                each.task.name: evaluate_task(
                    llm, tokenizer, each, folder, graders, seed=args.seed, on_progress=progress.show
                )
                for each in prepared
            },
        }
        progress.end()
        folder.write_results(results)
        return results


def _load(args: argparse.Namespace) -> LLM:
    from fireflyer.infer.llm import LLM

    return LLM(
        args.checkpoint,
        device=args.device,
        quantization=args.quantization,
        adapter=args.adapter,
        max_num_seqs=args.batch,
    )


def _check_room(llm: LLM, prepared: Sequence[Prepared]) -> None:
    for each in prepared:
        longest = max(each.settings["lengths"] or [0])
        if longest >= llm.max_length:
            raise UserError(
                f"--lengths {longest}: the model's context is {llm.max_length:,} tokens, answer included; give less"
            )
        if each.task.kind == "generate" and each.sampling.max_tokens > llm.max_length:
            print(
                f"{each.task.name}: answers of {each.sampling.max_tokens:,} tokens don't fit into the model's context "
                f"of {llm.max_length:,}; they end there",
                file=sys.stderr,
            )


def _name(checkpoint: str, prepared: Sequence[Prepared], settings: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return "-".join([Path(checkpoint).resolve().name, *(each.task.name for each in prepared), digest])


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """While entered, Ctrl-C and SIGTERM end the evaluation; the problems done are in its folder already."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(f"stopped; what is done is in {out}, the same command goes on from there")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Line:
    """How far a task is, on stderr: in place on a terminal, now and then elsewhere."""

    def __init__(self) -> None:
        self._shown_at = float("-inf")
        self._open = False

    def show(self, progress: Progress) -> None:
        last = progress.done == progress.total
        live = sys.stderr.isatty()
        if not last and time.monotonic() - self._shown_at < (0.1 if live else _PLAIN_EVERY_S):
            return
        self._shown_at = time.monotonic()
        text = f"{progress.task}: {progress.done:,} of {progress.total:,}, mean {progress.mean:.3f}"
        print(f"\r{text}\033[K" if live else text, end="" if live and not last else "\n", file=sys.stderr, flush=True)
        self._open = live and not last

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)


def _table(results: Mapping[str, Any]) -> str:
    lines = []
    for name, scores in results["tasks"].items():
        for key, value in scores.items():
            if isinstance(value, dict) and "low" in value:
                lines.append(f"{name:<15} {key:<20} {_shown(key, value)}")
        if scores.get("cut_short"):
            lines.append(f"{name:<15} {scores['cut_short']:.1%} of the answers were cut short by --max-tokens")
        for note, count in scores.get("notes", {}).items():
            lines.append(f"{name:<15} {count} x {note}")
    return "\n".join([*lines, f"prompts, answers and settings: {results['out']}"])


def _shown(key: str, value: Mapping[str, Any]) -> str:
    form = ".4f" if key == "bits_per_byte" else ".1%"
    if value["low"] is None:
        return f"{value['value']:>8{form}}  (of one problem)"
    interval = f"{value['low']:{form}} to {value['high']:{form}}"
    problems = f"{value['problems']:,} problem{'s' * (value['problems'] != 1)}"
    return f"{value['value']:>8{form}}  ({interval}; 95%, {value['method']}, {problems})"
