"""`fireflyer inspect CONFIG`: what a model consists of, what it weighs and what a token of it costs."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from fireflyer.cli.configs import find_model
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.config import ModelConfig


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="count a model's parameters, cache and operations",
        description="Count a model's parameters, the bytes of its files and its cache, and the operations of a token;"
        " with --fit say whether it fits this machine.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a checkpoint or run folder, a GGUF file, a config.json, a recipe, or a shipped model such as deepseek-v3",
    )
    parser.add_argument("--fit", action="store_true", help="say whether it fits this machine, and what to do if not")
    parser.add_argument(
        "--context", type=int, metavar="N", help="with --fit: tokens of each sequence; default: 4096 or the model's own"
    )
    parser.add_argument("--batch", type=int, metavar="B", help="with --fit: sequences at the same time; default: 1")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    context, batch = _asked(args)
    config = find_model(args.config)
    if context is not None and context > config.max_position_embeddings:
        raise UserError(
            f"--context is {context}, beyond the model's {config.max_position_embeddings:,} tokens; lower it"
        )
    facts = count(config)
    text = table(args.config, config, facts)
    if args.fit:
        from fireflyer.cli.fit_view import examine

        context = context or min(4096, config.max_position_embeddings)
        facts["fit"], fit_text = examine(args.config, config, context, batch)
        text += f"\n\n{fit_text}"
    print(json.dumps(facts) if args.json else text)
    return 0


def _asked(args: argparse.Namespace) -> tuple[int | None, int]:
    """--context and --batch. Raises UserError."""
    for name, value in (("--context", args.context), ("--batch", args.batch)):
        if value is not None and not args.fit:
            raise UserError(f"{name} {value} says what has to fit; add --fit")
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    return args.context, args.batch or 1


def count(config: ModelConfig) -> dict[str, Any]:
    """All counts; the parameters are checked against the real modules, built without memory on the meta device."""
    from dataclasses import asdict

    from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
    from fireflyer.cost.memory import bf16_checkpoint_bytes, fp8_checkpoint_bytes
    from fireflyer.cost.parameters import cache_bytes_per_token, count_parameters

    counts = count_parameters(config)
    built = _count_built(config)
    assert built == (counts.total, counts.mtp), f"the modules hold {built}, the arithmetic says {counts}"
    seq_len = min(4096, config.max_position_embeddings)
    return {
        "model_type": config.model_type,
        "parameters": asdict(counts),
        "checkpoint_bytes": {"bf16": bf16_checkpoint_bytes(config), "fp8": fp8_checkpoint_bytes(config)},
        "cache_bytes_per_token": cache_bytes_per_token(config),
        "train": {
            "seq_len": seq_len,
            "gflop_per_token": training_flops_per_token(config, seq_len) / 1e9,
            "mtp_gflop_per_token": mtp_training_flops_per_token(config, seq_len) / 1e9,
        },
    }


def _count_built(config: ModelConfig) -> tuple[int, int]:
    """Numbers in the decoder's own modules: of the main model with its gate biases, and of the MTP modules."""
    import torch

    from fireflyer.model.decoder import Decoder

    with torch.device("meta"):
        state = Decoder(config).state_dict()
    mtp = sum(tensor.numel() for name, tensor in state.items() if name.startswith("model.mtp."))
    return sum(tensor.numel() for tensor in state.values()) - mtp, mtp


def table(name: str, config: ModelConfig, facts: dict[str, Any]) -> str:
    """The same counts for people."""
    num_layers = config.num_hidden_layers
    num_moe = sum(config.is_moe(index) for index in range(num_layers))
    groups = [_totals(config, facts), _parts(config, facts["parameters"], num_moe), _per_token(config, facts)]
    lines = [f"{name}: {config.model_type}, {num_layers} layers ({num_moe} with experts), {config.hidden_size:,} wide"]
    for group in groups:
        lines.append("")
        lines += [f"{what:<26}{number:>20,}  {note}".rstrip() for what, number, note in group if number]
    return "\n".join(lines)


def _totals(config: ModelConfig, facts: dict[str, Any]) -> list[tuple[str, int, str]]:
    counts, files = facts["parameters"], facts["checkpoint_bytes"]
    return [
        ("parameters", counts["total"], ""),
        ("active per token", counts["active"], "with the head, without the embedding"),
        ("MTP modules", counts["mtp"], f"{config.num_nextn_predict_layers} deep, embedding and head shared"),
        ("in the checkpoint", counts["checkpoint"], f"{_size(files['bf16'])} in BF16, {_size(files['fp8'])} in FP8"),
    ]


def _parts(config: ModelConfig, counts: dict[str, int], num_moe: int) -> list[tuple[str, int, str]]:
    num_dense = config.num_hidden_layers - num_moe
    parts = [
        ("embedding", counts["embedding"], ""),
        ("output head", counts["head"], ""),
        ("attention", counts["attention_layer"], f"x {config.num_hidden_layers}"),
        ("dense feed-forward", counts["dense_ffn_layer"] if num_dense else 0, f"x {num_dense}"),
    ]
    if not num_moe:
        return parts
    return [
        *parts,
        ("experts of a layer", counts["moe_ffn_layer"], f"x {num_moe}"),
        ("  one routed expert", counts["routed_expert"], f"{config.num_experts_per_tok} of {config.n_routed_experts}"),
        ("  shared experts", counts["shared_experts"], f"{config.n_shared_experts} as one"),
    ]


def _per_token(config: ModelConfig, facts: dict[str, Any]) -> list[tuple[str, int, str]]:
    cache, train = facts["cache_bytes_per_token"], facts["train"]
    context = config.max_position_embeddings
    return [
        ("cache bytes per token", cache, f"{_size(cache * context)} for {context:,} tokens, in BF16"),
        ("training, MFLOP per token", round(train["gflop_per_token"] * 1e3), f"causal, {train['seq_len']:,} tokens"),
        ("  the MTP modules' MFLOP", round(train["mtp_gflop_per_token"] * 1e3), "beside it"),
    ]


def _size(num_bytes: float) -> str:
    """Bytes in decimal units with four figures at most."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes / 1e3:.4g} kB"
