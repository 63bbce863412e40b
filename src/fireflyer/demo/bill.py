"""What a demo's training took: time, work, the share of the machine's own rate, money; how its parts behaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from fireflyer.checkpoint.run_folder import read_metrics
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.evaluate.machine import measure_matmul_flops_per_s
from fireflyer.evaluate.speculation import mtp_acceptance
from fireflyer.infer.llm import LLM
from fireflyer.infer.request import RequestOutput

USD_PER_HOUR = 0.10
"""About the rent of a machine with two cloud cores."""

_BALANCE_STEPS = 100


@dataclass(frozen=True)
class Bill:
    """Times in seconds, money in dollars.

    `max_vio` is the mean over the last 100 steps; `mfu` the share of this machine's measured matrix product rate;
    `mtp_acceptance` how often the MTP head's draft was what the model said.
    """

    train_s: float
    tokens: int
    flops: float
    matmul_flops_per_s: float
    mfu: float
    usd_per_hour: float
    usd: float
    max_vio: float
    mtp_acceptance: float
    parameters: int


def make_bill(run_dir: Path, llm: LLM, seq_len: int, usd_per_hour: float, outputs: Sequence[RequestOutput]) -> Bill:
    """Of a finished run; `outputs`: what its model answered."""
    metrics = read_metrics(run_dir)
    train_s, tokens = metrics[-1]["train_s"], metrics[-1]["tokens"]
    config, counts = llm.config, count_parameters(llm.config)
    flops = tokens * (training_flops_per_token(config, seq_len) + mtp_training_flops_per_token(config, seq_len))
    peak = measure_matmul_flops_per_s()
    sequences = [
        ([*output.prompt_token_ids, *output.outputs[0].token_ids], len(output.prompt_token_ids)) for output in outputs
    ]
    return Bill(
        train_s=train_s,
        tokens=tokens,
        flops=flops,
        matmul_flops_per_s=peak,
        mfu=flops / train_s / peak,
        usd_per_hour=usd_per_hour,
        usd=train_s / 3600 * usd_per_hour,
        max_vio=mean(row["max_vio"] for row in metrics[-_BALANCE_STEPS:]),
        mtp_acceptance=mtp_acceptance(llm.model, sequences) or 0.0,
        parameters=counts.total + counts.mtp,
    )
