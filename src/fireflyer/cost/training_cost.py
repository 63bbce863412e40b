"""Days, device hours and dollars of a training plan, with context extension and post-training. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fireflyer.cost import v3_run
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token
from fireflyer.cost.judge import TrainingPlan
from fireflyer.cost.layouts import Job


@dataclass(frozen=True)
class TrainingCost:
    """`train`: pretraining of the main model, MTP's operations beside it. `total`: with the phases after it."""

    train: dict[str, Any]
    total: dict[str, Any]


def training_cost(
    job: Job,
    plan: TrainingPlan,
    *,
    tokens: float,
    usd_per_hour: float | None,
    hours_per_trillion: float | None = None,
    context_hours: float | None = None,
    post_hours: float | None = None,
) -> TrainingCost:
    """What the tokens cost.

    Args:
        usd_per_hour: rent of one card; None: dollars are None.
        hours_per_trillion: device hours per trillion tokens where they are known, in place of the plan's prediction.
        context_hours, post_hours: of the later phases; None: as V3's, 119,000 and 5,000 hours after 2,664,000 of
            pretraining.
    """
    predicted = job.count / plan.tokens_per_s * 1e12 / 3600
    rate = predicted if hours_per_trillion is None else hours_per_trillion
    speed = job.count * 1e12 / 3600 / rate
    hours = tokens / 1e12 * rate
    ratio = hours / v3_run.pretraining_gpu_hours()
    context = v3_run.CONTEXT_EXTENSION_GPU_HOURS * ratio if context_hours is None else context_hours
    post = v3_run.POST_TRAINING_GPU_HOURS * ratio if post_hours is None else post_hours
    per_token = training_flops_per_token(job.config, job.seq_len)

    def usd(device_hours: float) -> float | None:
        return None if usd_per_hour is None else device_hours * usd_per_hour

    train = {
        "gflop_per_token": per_token / 1e9,
        "mtp_gflop_per_token": mtp_training_flops_per_token(job.config, job.seq_len) / 1e9,
        "tokens_per_s": speed,
        "mfu": per_token * speed / (job.count * job.gpu.peak("bf16")),
        "days": hours / job.count / 24,
        "device_hours": hours,
        "usd": usd(hours),
        "tokens": tokens,
        "seq_len": job.seq_len,
        "global_batch": job.global_batch,
        "precision": job.precision,
        "step_s": plan.step.total,
        "bubble_s": plan.step.bubble,
        "all_to_all_s": plan.all_to_all_s,
        "gradients_s": plan.step.gradients,
        "optimizer_s": plan.step.optimizer,
        "predicted_device_hours": tokens / 1e12 * predicted,
    }
    everything = hours + context + post
    total = {
        "device_hours": everything,
        "usd": usd(everything),
        "context_extension_hours": context,
        "post_training_hours": post,
    }
    return TrainingCost(train, total)
