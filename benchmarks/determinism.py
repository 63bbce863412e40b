"""What `deterministic=True` costs: tokens/s of prompts and of decoding with and without it, alone and at 16 at once;
and how many of 16 answers have the same bits in the batch as alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from statistics import median

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command sets it; before torch loads

import torch

from benchmarks._peer import small_model
from benchmarks._result import Proof, Table
from fireflyer import LLM, SamplingParams
from fireflyer.infer.options import EngineOptions
from fireflyer.model.decoder import Decoder

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 48, 3
BATCHES = (1, 16)
ARITHMETIC = {"plain": False, "deterministic": True}


def main() -> Proof:
    """Medians of runs that take turns, so that a slow minute of the machine is shared by both."""
    model = small_model()
    llms = {name: _engine(model, deterministic) for name, deterministic in ARITHMETIC.items()}
    prompts = _prompts(model.config.vocab_size, max(BATCHES))
    same = {name: _same_as_alone(llm, prompts) for name, llm in llms.items()}  # the first calls, which also probe
    speeds: dict[str, dict[str, list[float]]] = {}
    for _ in range(REPEATS):
        for batch in BATCHES:
            for name, llm in llms.items():
                for what, speed in _tokens_per_s(llm, prompts[:batch]).items():
                    speeds.setdefault(f"{what}, {batch} at once", {}).setdefault(name, []).append(speed)
    middle = {what: {name: median(values) for name, values in row.items()} for what, row in speeds.items()}
    share = {what: row["deterministic"] / row["plain"] for what, row in middle.items()}
    rows: list[list[str | int]] = [
        [what, f"{row['plain']:,.0f}", f"{row['deterministic']:,.0f}", f"{share[what]:.0%}"]
        for what, row in middle.items()
    ]
    rows.append([f"answers of {max(BATCHES)} with the same bits as alone", same["plain"], same["deterministic"], ""])
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "tokens_per_s": middle,
        "all_tokens_per_s": speeds,
        "share_of_plain": share,
        "same_as_alone": same,
    }
    missed = [] if same["deterministic"] == max(BATCHES) else [f"all answers as alone: {same['deterministic']}"]
    return Proof(figures, {"cost": Table(["tokens/s", *ARITHMETIC, "share"], rows)}, missed=missed)


def _engine(model: Decoder, deterministic: bool) -> LLM:
    options = EngineOptions(max_length=1024, prefix_cache=False, deterministic=deterministic)
    return LLM.from_model(model, options=options)


def _prompts(vocab_size: int, count: int) -> list[Sequence[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, vocab_size, (count, PROMPT_TOKENS), generator=generator).tolist()


def _params(num_tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=logprobs)


def _same_as_alone(llm: LLM, prompts: list[Sequence[int]]) -> int:
    """Answers of one batch whose tokens and log-probabilities are those of the request by itself."""
    params = _params(16, logprobs=1)
    together = [output.outputs[0] for output in llm.generate(prompts, params)]
    alone = [llm.generate([prompt], params)[0].outputs[0] for prompt in prompts]
    return sum(a.token_ids == b.token_ids and a.logprobs == b.logprobs for a, b in zip(together, alone, strict=True))


def _tokens_per_s(llm: LLM, prompts: list[Sequence[int]]) -> dict[str, float]:
    started = time.perf_counter()
    llm.generate(prompts, _params(1))
    read = time.perf_counter()
    llm.generate(prompts, _params(1 + NEW_TOKENS))
    written = time.perf_counter() - read
    prefill = read - started
    return {
        "prompts": len(prompts) * PROMPT_TOKENS / prefill,
        "decoding": len(prompts) * NEW_TOKENS / (written - prefill),
    }
