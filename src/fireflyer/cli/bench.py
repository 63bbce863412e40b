"""`fireflyer bench CHECKPOINT`: tokens a second, and how near that is to what this machine's memory allows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.cli.sampling import expert_hit_rate
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.evaluate.speed import Speed
    from fireflyer.infer.llm import LLM


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "bench",
        help="measure how fast a checkpoint reads and writes here",
        description="Measure how fast a checkpoint reads prompts and writes answers here, and what share that is of "
        "what the machine's memory gives, measured in the same minute.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="sequences at once; default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="default: 512, or what the context holds")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="default: 128, or what the context holds")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what prompts are cut from; default: Python's own library"
    )
    parser.add_argument("--deterministic", action="store_true", help="the same bits alone and in any batch")
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="pack the weights on the way in: less memory, faster answers"
    )
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="memory for routed experts, as 8GiB; the others are read when needed; default: all in memory",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    for name, least in (("batch", 1), ("prompt_tokens", 1), ("new_tokens", 2)):
        asked = getattr(args, name)
        if asked is not None and asked < least:
            raise UserError(f"--{name.replace('_', '-')} is {asked}; it must be at least {least}")
    from fireflyer.evaluate.machine import measure_read_bytes_per_s
    from fireflyer.evaluate.speed import measure_speed, sample_prompts
    from fireflyer.infer.llm import LLM

    llm = LLM(
        args.checkpoint,
        device=args.device,
        quantization=args.quantization,
        expert_memory=args.expert_memory,
        max_num_seqs=args.batch,
        deterministic=args.deterministic,
    )
    prompt_tokens = args.prompt_tokens or min(512, llm.max_length * 3 // 4)
    new_tokens = args.new_tokens or max(2, min(128, llm.max_length - prompt_tokens))
    if prompt_tokens + new_tokens > llm.max_length:
        raise UserError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} of answer don't fit into the model's context of "
            f"{llm.max_length}; lower --prompt-tokens or --new-tokens"
        )
    tokens = _text_tokens(llm, args.text, args.batch * prompt_tokens)
    speed = measure_speed(llm, sample_prompts(tokens, args.batch, prompt_tokens), new_tokens)
    bandwidth = measure_read_bytes_per_s() if args.device == "cpu" else None
    facts = {"batch": args.batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    facts |= _facts(llm, speed, bandwidth)
    print(json.dumps(facts) if args.json else _table(facts))
    return 0


def _text_tokens(llm: LLM, file: Path | None, wanted: int) -> list[int]:
    """Token ids to cut prompts from, of a file or of Python's library; without a tokenizer, ids in turn."""
    if llm.tokenizer is None:
        if file is not None:
            raise UserError(f"--text {file} needs a tokenizer.json beside the model; leave it out")
        return [(7 * i) % llm.config.vocab_size for i in range(max(wanted, llm.config.vocab_size))]
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {file}: {error}") from None
        tokens = llm.tokenizer.encode(text)
        if not tokens:
            raise UserError(f"--text {file} is empty; give one with some text")
        return tokens
    from fireflyer.data.builtin import stdlib_documents

    documents, tokens = stdlib_documents(), []
    for index in range(documents.num_documents):
        tokens += llm.tokenizer.encode(documents.read(index).text)
        if len(tokens) >= wanted:
            break
    return tokens


def _facts(llm: LLM, speed: Speed, bandwidth: float | None) -> dict[str, Any]:
    import torch

    return {
        "dtype": _weights(llm),
        "threads": torch.get_num_threads(),
        "prefill_tokens_per_s": speed.prefill_tokens_per_s,
        "decode_tokens_per_s": speed.decode_tokens_per_s,
        "gb_per_s": speed.bytes_per_s / 1e9,
        "bandwidth_gb_per_s": None if bandwidth is None else bandwidth / 1e9,
        "bandwidth_share": None if bandwidth is None else speed.bytes_per_s / bandwidth,
        "experts_per_layer": speed.experts_per_layer,
        "mtp_decode_tokens_per_s": speed.mtp_decode_tokens_per_s,
        "mtp_acceptance": speed.mtp_acceptance,
        "expert_hit_rate": expert_hit_rate(llm.engine.stats),
    }


def _weights(llm: LLM) -> str:
    """What most of the weights are kept as."""
    from fireflyer.numerics.linear import PackedLinear

    layer = llm.model.get_submodule("model.layers.0.self_attn.o_proj")
    return layer.shape.kind if isinstance(layer, PackedLinear) else str(llm.model.dtype).removeprefix("torch.")


def _table(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['batch']} x {facts['prompt_tokens']} tokens of prompt, {facts['new_tokens']} of answer; "
        f"{facts['dtype']}, {facts['threads']} threads",
        f"prompts  {facts['prefill_tokens_per_s']:10,.0f} tokens/s",
        f"answers  {facts['decode_tokens_per_s']:10,.0f} tokens/s  {facts['gb_per_s']:.1f} GB/s",
    ]
    if facts["bandwidth_share"] is not None:
        lines[-1] += f", {facts['bandwidth_share']:.0%} of the {facts['bandwidth_gb_per_s']:.1f} that memory gives"
    if facts["mtp_acceptance"] is not None:
        accepted = f"{facts['mtp_acceptance']:.0%} of drafts accepted"
        lines.append(f"with MTP {facts['mtp_decode_tokens_per_s']:10,.0f} tokens/s  {accepted}")
    if facts["expert_hit_rate"] is not None:
        lines.append(f"experts  {facts['expert_hit_rate']:10.0%} found in memory, the others read")
    return "\n".join(lines)
