"""How a decode rate is taken, ours and transformers': tokens a second after the first one of every sequence."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fireflyer import LLM, SamplingParams
from fireflyer.infer.stats import EngineStats

PROMPT, NEW = 128, 128


def random_prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Token ids of the small model's vocabulary."""
    generator = random.Random(seed)
    return [[generator.randrange(2, 4096) for _ in range(length)] for _ in range(count)]


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def our_decode(llm: LLM, prompts: list[list[int]]) -> tuple[float, float]:
    """NEW tokens for each prompt: the rate, and what of the steps' time is not the decoder."""
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    requests = [llm.make_request(prompt, params) for prompt in prompts]
    for request in requests:
        llm.engine.add(request)
    while any(not request.answers[0].num_written for request in requests):
        llm.engine.step()
    before, began = llm.engine.stats, time.perf_counter()
    while llm.engine.unfinished:
        llm.engine.step()
    seconds, after = time.perf_counter() - began, llm.engine.stats
    return (after.generated_tokens - before.generated_tokens) / seconds, python_share(before, after)


def python_share(before: EngineStats, after: EngineStats) -> float:
    """Of the steps between two readings."""
    return 1 - (after.model_s - before.model_s) / (after.step_s - before.step_s)


@torch.inference_mode()
def peer_generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> torch.Tensor:
    """transformers' greedy answers, padded at the left; ids of prompt and answer. options: more of its `generate`."""
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        **options,
    )
