"""One packed folder in a process of its own: `python -m benchmarks._packed_speed WHAT FOLDER THREADS`, one JSON line.

first    seconds are counted by who starts it: the line comes with the first token of an answer
speed    tokens a second of a prompt of 512 and of an answer of 64, and the peak memory with 4,096 tokens in the cache
context  seconds of a token behind 0, 4,096, 16,384 and 65,536 others
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from statistics import median

import torch

from fireflyer.infer.llm import LLM
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.scheduler import Span

PROMPT, NEW, CACHED, REPEATS = 512, 64, 4096, 3
CONTEXTS = (0, 4096, 16384, 65536)
_CONTEXT_STEPS = 12


def main() -> None:
    what, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    measure = {"first": _first, "speed": _speed, "context": _context}[what]
    print(json.dumps(measure(folder)), flush=True)


def _first(folder: str) -> dict[str, float]:
    llm = LLM(folder, max_length=512, max_num_seqs=1)
    llm.generate([_prompt(llm, 8)], SamplingParams(max_tokens=1, temperature=0))
    return {}


def _speed(folder: str) -> dict[str, float]:
    llm = LLM(folder, max_length=CACHED + NEW, max_num_seqs=1, prefix_cache=False)
    _answer(llm, 32, 4)  # the first calls of a process are slow
    passes = [_answer(llm, PROMPT, NEW) for _ in range(REPEATS)]
    _answer(llm, CACHED - 1, 2)
    return {
        "prompt_tokens_per_s": PROMPT / median(read for read, _ in passes),
        "decode_tokens_per_s": (NEW - 1) / median(wrote for _, wrote in passes),
        "peak_gib": _peak_bytes() / 2**30,
    }


def _answer(llm: LLM, prompt: int, new: int) -> tuple[float, float]:
    """Seconds until the first token, and from there to the last."""
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    parts = llm.stream_sync(_prompt(llm, prompt), params)
    next(parts)
    first = time.perf_counter()
    for _ in parts:
        pass
    return first - began, time.perf_counter() - first


def _context(folder: str) -> dict[str, dict[str, float]]:
    """A step behind so many tokens; what the cache holds doesn't matter to the time, so that nobody computed it."""
    size = 16
    llm = LLM(folder, max_length=CONTEXTS[-1] + size, max_num_seqs=1, cache_dtype="bf16", num_speculative_tokens=0)
    engine = llm.engine
    for layer in engine._cache.slots:
        layer.normal_()
    seconds = {}
    for context in CONTEXTS:
        request = llm.make_request(_prompt(llm, max(context, 1)), SamplingParams(max_tokens=1))
        answer = request.answers[0]
        answer.blocks = list(range(1, 1 + -(-(context + _CONTEXT_STEPS) // size)))
        times = []
        with torch.inference_mode():
            for step in range(_CONTEXT_STEPS):
                began = time.perf_counter()
                batch = engine._runner.batch([Span(answer, context + step, context + step + 1)])
                engine._runner.logits(engine._runner.trunk(batch, [step]).hidden_BTD[0]).argmax()
                times.append(time.perf_counter() - began)
        seconds[str(context)] = median(times[2:])
    return {"seconds": seconds}


def _prompt(llm: LLM, length: int) -> list[int]:
    return random.Random(length).choices(range(llm.config.vocab_size), k=length)


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
