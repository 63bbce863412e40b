"""How fast a model reads and writes here, and how near that is to what this machine's memory allows.

In: an LLM and prompts. Out: tokens per second of prompts and of answers, and for plain decoding the bytes that its
weights and cache make it read, per second. Drafts of the MTP layers are measured apart: they change what a token reads.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fireflyer.cost.parameters import cache_bytes_per_token
from fireflyer.infer.engine import Engine
from fireflyer.infer.llm import LLM
from fireflyer.infer.paged_cache import cache_torch_dtype
from fireflyer.infer.request import Request
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts
from fireflyer.model.packed_experts import PackedExperts

_LOOKED_AT = 16
"""Decode steps whose experts are counted."""


@dataclass(frozen=True)
class Speed:
    """Of one batch of equal prompts, answered greedily to a fixed length.

    decode_tokens_per_s: of all sequences together, once every prompt has been read; no drafts.
    bytes_per_s: what plain decoding had to read in that time: weights and cached latents.
    experts_per_layer: distinct experts that a layer used in a decode step, the mean.
    mtp_decode_tokens_per_s, mtp_acceptance: the same with drafts; None where the model has no MTP layer.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    bytes_per_s: float
    experts_per_layer: float
    mtp_decode_tokens_per_s: float | None
    mtp_acceptance: float | None


@dataclass(frozen=True)
class _Pass:
    prefill_s: float
    decode_s: float
    decoded: int
    steps: int
    drafted: int
    accepted: int


def measure_speed(llm: LLM, prompts: Sequence[list[int]], new_tokens: int) -> Speed:
    """Answer the prompts together, without drafts and, where the model can, with them.

    Args:
        llm: its engine must be idle; engines of their own are made on its model, with its options.
        prompts: token ids, as many as there shall be sequences.
        new_tokens: length of each answer, at least 2.
    """
    plain = _engine(llm, drafts=0)
    _answer(llm, plain, [prompt[:32] for prompt in prompts], 4)  # the first calls of a process are slow
    timed = _answer(llm, plain, prompts, new_tokens)
    experts = _experts_per_layer(llm, plain, prompts, min(new_tokens, _LOOKED_AT))
    # While the answers grow, a step reads on average half of them from the cache.
    contexts = [len(prompt) + new_tokens // 2 for prompt in prompts]
    cached = cache_torch_dtype(llm.options.cache_dtype, llm.model.dtype).itemsize
    step_bytes = weight_bytes_per_step(llm.model, experts) + sum(contexts) * cache_bytes_per_token(llm.config, cached)
    with_drafts = None
    if llm.config.num_nextn_predict_layers and llm.options.num_speculative_tokens != 0:
        with_drafts = _answer(llm, _engine(llm, drafts=llm.options.num_speculative_tokens), prompts, new_tokens)
    return Speed(
        prefill_tokens_per_s=sum(map(len, prompts)) / timed.prefill_s,
        decode_tokens_per_s=timed.decoded / timed.decode_s,
        bytes_per_s=timed.steps * step_bytes / timed.decode_s,
        experts_per_layer=experts,
        mtp_decode_tokens_per_s=None if with_drafts is None else with_drafts.decoded / with_drafts.decode_s,
        mtp_acceptance=None if with_drafts is None else with_drafts.accepted / max(with_drafts.drafted, 1),
    )


def weight_bytes_per_step(model: Decoder, experts_per_layer: float) -> float:
    """Bytes of weights that a decode step of the main model reads at least, as they are stored; of the embedding, which
    it reads by rows, none, unless it serves as head.

    experts_per_layer: distinct routed experts that a layer uses for the whole batch.
    """
    total = 0.0
    for name, module in model.named_modules():
        if name.startswith("model.mtp.") or (module is model.model.embed_tokens and model.lm_head is not None):
            continue
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        used = experts_per_layer if isinstance(module, (Experts, PackedExperts)) else None
        total += sum(t.nbytes * (1 if used is None else used / t.shape[0]) for t in tensors)
    return total


def sample_prompts(text_tokens: Sequence[int], num_prompts: int, length: int, seed: int = 0) -> list[list[int]]:
    """Pieces of a text from different places, so that no prompt begins like another; a short text is repeated."""
    tokens = list(text_tokens) * (1 + (num_prompts + length) // len(text_tokens))
    starts = random.Random(seed).sample(range(len(tokens) - length + 1), num_prompts)
    return [tokens[start : start + length] for start in starts]


def _engine(llm: LLM, *, drafts: int | None) -> Engine:
    # Without the prefix cache, or the second pass would find what the first one has read.
    options = replace(llm.options, num_speculative_tokens=drafts, prefix_cache=False)
    return Engine(llm.model, llm.tokenizer, options)


def _requests(llm: LLM, prompts: Sequence[list[int]], new_tokens: int, *, report_experts: bool) -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    return [llm.make_request(prompt, params, report_experts=report_experts) for prompt in prompts]


def _answer(llm: LLM, engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> _Pass:
    requests = _requests(llm, prompts, new_tokens, report_experts=False)
    before = engine.stats
    began = time.perf_counter()
    for request in requests:
        engine.add(request)
    while any(not request.answers[0].num_written for request in requests):
        engine.step()
    all_read = time.perf_counter()
    middle = engine.stats
    while engine.unfinished:
        engine.step()
    after = engine.stats
    return _Pass(
        prefill_s=all_read - began,
        decode_s=time.perf_counter() - all_read,
        decoded=after.generated_tokens - middle.generated_tokens,
        steps=after.steps - middle.steps,
        drafted=after.drafted_tokens - before.drafted_tokens,
        accepted=after.accepted_tokens - before.accepted_tokens,
    )


def _experts_per_layer(llm: LLM, engine: Engine, prompts: Sequence[list[int]], new_tokens: int) -> float:
    """Distinct experts of a layer in the step that wrote the i-th tokens, over layers and steps; 0 without experts."""
    requests = _requests(llm, prompts, new_tokens, report_experts=True)
    for request in requests:
        engine.add(request)
    while engine.unfinished:
        engine.step()
    together: list[int] = []
    for i in range(1, new_tokens):
        layers = zip(*(request.answers[0].experts[i] for request in requests), strict=True)
        together += [len(set().union(*map(set, layer))) for layer in layers]
    return sum(together) / len(together) if together else 0.0
