"""Decoding against transformers, uncompiled and compiled: the same weights, greedy, through our whole engine.

Uncompiled transformers runs with each of its two ways for experts and is judged by the faster one. Compiled it has what
is fastest there, batched_mm with a static cache, for one sequence (its first call takes a minute; for 16 it takes
longer than this proof may). Ours is never compiled: its step is the native kernels'. Contenders take turns.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command sets it; before torch loads, and for every contender

import torch

from benchmarks._decode import NEW, PROMPT, our_decode, peer_generate, random_prompts, timed
from benchmarks._peer import small_model, transformers_model
from benchmarks._result import Proof, Table
from fireflyer import LLM
from fireflyer.cost.memory import decode_step_bytes
from fireflyer.evaluate.machine import measure_read_bytes_per_s
from fireflyer.infer.options import EngineOptions

ROUNDS = 5
FLOORS = {"eager_1": 1.9, "eager_16": 2.6, "compiled_1": 1.5}
TARGETS = {"eager_1": 3.0, "eager_16": 4.0, "compiled_1": 2.0}


def main() -> Proof:
    """Tokens a second by batch and contender, and what reading the weights alone would allow."""
    with tempfile.TemporaryDirectory() as folder:
        ours = LLM.from_model(small_model(), options=EngineOptions(num_speculative_tokens=0))
        theirs = {kind: transformers_model(Path(folder) / kind, kind).eval() for kind in ("eager", "grouped_mm")}
        compiled = transformers_model(Path(folder) / "batched_mm", "batched_mm").eval()
        compiled.forward = torch.compile(compiled.forward)
        _check_tokens(ours, theirs["eager"])
        rates = _rates(ours, theirs, compiled)
    bandwidth = measure_read_bytes_per_s()
    config = ours.config
    step_bytes = decode_step_bytes(config, [PROMPT + NEW // 2], bytes_per_weight=4, bytes_per_cached=4)
    reached = {
        "eager_1": rates[1]["fireflyer"] / max(rates[1][kind] for kind in theirs),
        "eager_16": rates[16]["fireflyer"] / max(rates[16][kind] for kind in theirs),
        "compiled_1": rates[1]["fireflyer"] / rates[1]["compiled"],
    }
    names = {
        "fireflyer": "fireflyer",
        "eager": "transformers, eager experts",
        "grouped_mm": "transformers, grouped_mm",
        "compiled": "transformers, batched_mm, compiled, static cache",
    }
    rows = [
        [text, *(f"{rates[batch][name]:,.0f}" if name in rates[batch] else "" for batch in (1, 16))]
        for name, text in names.items()
    ]
    rows.append(["reading the weights of a step, and nothing else", f"{bandwidth / step_bytes:,.0f}", ""])
    figures = {
        "tokens_per_s": {str(batch): found for batch, found in rates.items()},
        "step_bytes": step_bytes,
        "read_bytes_per_s": bandwidth,
        "share_of_bandwidth": rates[1]["fireflyer"] * step_bytes / bandwidth,
        "reached": reached,
        "floors": FLOORS,
        "targets": TARGETS,
    }
    missed = [
        f"{name}: {reached[name]:.2f}, the target is {TARGETS[name]}"
        for name in TARGETS
        if reached[name] < TARGETS[name]
    ]
    return Proof(figures, {"decode": Table(["tokens/s", "1 sequence", "16 sequences"], rows)}, missed=missed)


def _check_tokens(ours: LLM, theirs: Any) -> None:
    """The same tokens, before any speed is compared."""
    from fireflyer import SamplingParams

    prompts = random_prompts(4, PROMPT, 7)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    own = [output.outputs[0].token_ids for output in ours.generate(prompts, params)]
    assert own == peer_generate(theirs, prompts, 32)[:, PROMPT:].tolist()


def _rates(ours: LLM, theirs: dict[str, Any], compiled: Any) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, list[float]]] = {
        1: {name: [] for name in ("fireflyer", *theirs, "compiled")},
        16: {name: [] for name in ("fireflyer", *theirs)},
    }
    for turn in range(-1, ROUNDS):  # the first round warms up, and compiles
        for batch, rates in found.items():
            prompts = random_prompts(batch, PROMPT, 100 + turn)
            ours.engine.forget_prefixes()
            rate, _ = our_decode(ours, prompts)
            measured = {"fireflyer": rate}
            for name in rates.keys() - {"fireflyer"}:
                model, options = (
                    (compiled, {"cache_implementation": "static"}) if name == "compiled" else (theirs[name], {})
                )
                first = timed(lambda: peer_generate(model, prompts, 2, **options))  # noqa: B023 (called at once)
                whole = timed(lambda: peer_generate(model, prompts, NEW + 1, **options))  # noqa: B023
                measured[name] = batch * (NEW - 1) / (whole - first)
            for name, rate in measured.items() if turn >= 0 else ():
                rates[name].append(rate)
    return {batch: {name: median(values) for name, values in rates.items()} for batch, rates in found.items()}
