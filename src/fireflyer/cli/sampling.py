"""The options of `generate` and `chat`: how tokens are chosen, when to stop, where the model runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fireflyer.infer.sampling_params import SamplingParams
    from fireflyer.infer.stats import EngineStats


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, max_tokens: int, temperature: float, top_p: float
) -> None:
    """Add them, with these defaults."""
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 is greedy; default: %(default)s"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        metavar="P",
        help="share of the probability drawn from; default: %(default)s",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0 is off")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop what is less probable than P of the most probable"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="pack the weights on the way in: less memory, faster answers"
    )
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="memory for routed experts, as 8GiB; the others are read when needed; default: all in memory",
    )
    parser.add_argument(
        "--adapter", metavar="PATH", help="a LoRA adapter to add to the weights: its folder, or the run that trained it"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")


def sampling_params(args: argparse.Namespace, stop: list[str]) -> SamplingParams:
    """What the options ask for. Raises UserError."""
    from fireflyer.infer.sampling_params import SamplingParams

    return SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        stop=stop,
    )


def expert_hit_rate(stats: EngineStats) -> float | None:
    """The share of a routed expert's uses for which it was in memory; None where all experts are."""
    uses = stats.expert_hits + stats.expert_misses
    return stats.expert_hits / uses if uses else None
