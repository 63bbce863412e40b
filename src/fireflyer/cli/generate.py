"""`fireflyer generate CHECKPOINT PROMPT`: continue a text; the text to stdout as it grows, the speed to stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from fireflyer.cli.sampling import add_sampling_arguments, expert_hit_rate, sampling_params
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.infer.llm import LLM
    from fireflyer.infer.sampling_params import SamplingParams


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text with a checkpoint. The text goes to stdout as it is written, the speed to stderr.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", default="-", help="the text to continue; - reads stdin")
    add_sampling_arguments(parser, max_tokens=256, temperature=1.0, top_p=1.0)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the text")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    params = sampling_params(args, args.stop)
    prompt = _read_stdin() if args.prompt == "-" else args.prompt
    from fireflyer.infer.llm import LLM

    llm = LLM(
        args.checkpoint,
        device=args.device,
        quantization=args.quantization,
        expert_memory=args.expert_memory,
        adapter=args.adapter,
    )
    facts = _generate(llm, prompt, params, show=not args.json)
    if args.json:
        print(json.dumps(facts))
    hit_rate = expert_hit_rate(llm.engine.stats)
    print(
        f"{facts['prompt_tokens']} tokens read at {facts['prefill_tokens_per_s']:.0f} tokens/s, "
        f"{len(facts['token_ids'])} written at {facts['decode_tokens_per_s']:.0f} tokens/s ({facts['finish_reason']})"
        f"{'' if hit_rate is None else f'; {hit_rate:.0%} of experts found in memory'}",
        file=sys.stderr,
    )
    return 0


def _read_stdin() -> str:
    """All of stdin without the line end that `echo` and editors put last. Raises UserError."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: invalid UTF-8 at byte {error.start}; convert the prompt first") from None
    return text.removesuffix("\n").removesuffix("\r")


def _generate(llm: LLM, prompt: str, params: SamplingParams, *, show: bool) -> dict[str, Any]:
    """One answer, printed as it grows if `show`; its facts under the names of --json."""
    token_ids = llm.encode_prompt(prompt)
    written: list[int] = []
    texts: list[str] = []
    finish_reason = stop_reason = None
    num_first, started = 0, time.perf_counter()
    first = started
    for part in llm.stream_sync(token_ids, params):
        if part.error is not None:
            raise UserError(part.error)
        if not written:
            num_first, first = len(part.token_ids), time.perf_counter()
        written += part.token_ids
        texts.append(part.text)
        finish_reason, stop_reason = part.finish_reason, part.stop_reason
        if show:
            print(part.text, end="", flush=True)
    ended = time.perf_counter()
    if show:
        print()
    return {
        "prompt": prompt,
        "text": "".join(texts),
        "prompt_tokens": len(token_ids),
        "token_ids": written,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
        "prefill_tokens_per_s": len(token_ids) / (first - started),
        "decode_tokens_per_s": (len(written) - num_first) / max(ended - first, 1e-9),
    }
