"""What `fireflyer plan` says a rank takes against what processes take: their resident memory, at its peak.

Six layouts of at least 1 GiB of state, each in a process of its own: a model is built and trained for a step of two
micro-batches as V3 is, with bf16 moments, fp32 masters and gradients, and products in bf16 or in emulated FP8. Growth
is the peak over what the process took with torch loaded and a tiny model trained. oneDNN, which computes bf16 products
on a CPU, would keep a compiled product for every number of rows that an expert ever had: it is told not to.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks._result import ROOT, Proof, Table
from fireflyer import ModelConfig
from fireflyer.cost.memory_plan import Memory, Spread, rank_memory, rank_parameters
from fireflyer.cost.parameters import count_parameters
from fireflyer.cost.stages import RankLayers
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.model.fp8_layers import use_fp8
from fireflyer.train.losses import count_valid, training_losses
from fireflyer.train.optimizer import DecoderOptimizer
from fireflyer.train.settings import OptimizerSettings

LARGEST_OFF, LEAST_STATE = 0.15, 2**30
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 2048,
    "num_nextn_predict_layers": 1,
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
}
QUIET = {"OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "MALLOC_MMAP_THRESHOLD_": str(2**18)}
"""One thread; no products kept; and freed tensors go back to the system, so that the peak is of what is used."""


@dataclass(frozen=True)
class Case:
    """One layout: what the plan is asked and the process does."""

    name: str
    precision: str
    recompute: str
    rows: int
    length: int
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict({**SHAPE, **self.changed})


DEEP = {"num_hidden_layers": 14, "n_routed_experts": 16, "num_nextn_predict_layers": 0}
WIDE = {"hidden_size": 1024, "num_hidden_layers": 4, "n_routed_experts": 16, "vocab_size": 16384}
CASES = (
    Case("V3's form, 8 layers", "fp8", "none", 4, 256),
    Case("V3's form, 8 layers", "fp8", "full", 4, 256),
    Case("14 layers without MTP", "fp8", "none", 2, 256, DEEP),
    Case("4 wide layers, more words", "fp8", "none", 2, 256, WIDE),
    Case("4 wide layers, more words", "fp8", "full", 4, 256, WIDE),
    Case("V3's form, 8 layers", "bf16", "none", 4, 256),
)


def main() -> Proof:
    """About a minute a layout."""
    rows, figures, missed = [], {}, []
    for number, case in enumerate(CASES, start=1):
        plan, grown = planned(case), _measured_aside(case)
        state = plan.weights + plan.gradients + plan.optimizer
        off = plan.total / grown - 1
        figures[f"layout_{number}"] = {
            **asdict(case),
            **asdict(plan),
            "planned": plan.total,
            "grown": grown,
            "off": off,
        }
        shown = [f"{size / 2**30:.2f}" for size in (state, plan.activations + plan.buffers, plan.total, grown)]
        rows.append([case.name, case.precision, case.recompute, f"{case.rows} x {case.length}", *shown, f"{off:+.1%}"])
        if state < LEAST_STATE:
            missed.append(f"{case.name}: state of at least 1 GiB: {state / 2**30:.2f} GiB")
        if abs(off) > LARGEST_OFF:
            missed.append(f"{case.name}, {case.precision}: planned within {LARGEST_OFF:.0%} of measured: {off:+.1%}")
    columns = ["layout", "products", "recomputed", "tokens", "state, GiB", "passing, GiB", "planned", "measured", "off"]
    return Proof({"layouts": figures}, {"layouts": Table(columns, rows)}, missed=missed)


def planned(case: Case) -> Memory:
    """One rank with the whole model on it."""
    config = case.config
    dense = config.first_k_dense_replace
    layers = RankLayers(dense, config.num_hidden_layers - dense, embedding=True, tail=True)
    parameters = rank_parameters(config, count_parameters(config), layers, 1)
    spread = Spread(case.precision, case.recompute, 1, 1, 1, case.rows * case.length, 1, 1)
    return rank_memory(config, layers, parameters, spread)


def measured(case: Case) -> int:
    """Bytes that this process grows by while it trains."""
    torch.set_num_threads(1)
    _steps(case, ModelConfig.from_dict({**SHAPE, **TINY}), 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _steps(case, case.config, case.length)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _steps(case: Case, config: ModelConfig, length: int) -> None:
    model = Decoder(config)
    init_weights_(model, torch.Generator().manual_seed(0))
    if case.precision == "fp8":
        use_fp8(model)
    optimizer = DecoderOptimizer(model, OptimizerSettings(), torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # micro-batches: the gradients of the first are there while the second runs
        ids = torch.randint(config.vocab_size, (case.rows, length), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            terms = training_losses(
                model.trunk(ids, recompute=case.recompute == "full"),
                model.head_weight,
                ids,
                None,
                num_experts_per_tok=config.num_experts_per_tok,
                valid_in_batch=count_valid(ids),
                rows_in_batch=case.rows,
            )
        terms.total(0.3, 1e-4).backward()
        del terms
    optimizer.step(1e-4)


def _measured_aside(case: Case) -> int:
    """In a fresh process, whose peak is its own."""
    code = "import json, sys; from benchmarks.plan_memory import *; print(measured(Case(**json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(asdict(case))]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])
