"""What DeepSeek-V3 cost to train, from the report's own figures (section 1, table 1; machines: section 3.1)."""

from __future__ import annotations

PRETRAINING_TOKENS = 14.8e12
SEQ_LEN = 4096
NUM_GPUS = 2048

GPU_HOURS_PER_TRILLION_TOKENS = 180_000
CONTEXT_EXTENSION_GPU_HOURS = 119_000
POST_TRAINING_GPU_HOURS = 5_000
USD_PER_GPU_HOUR = 2.0
"""The report's assumed rent of an H800."""

H800_BF16_FLOPS_PER_S = 989.5e12
"""Dense BF16 peak of the Hopper SXM card (NVIDIA's data sheet); V3 ran most products in FP8, whose peak is twice."""


def pretraining_gpu_hours(tokens: float = PRETRAINING_TOKENS) -> float:
    """H800 hours for so many tokens at the report's rate: 2.664M for all 14.8T."""
    return tokens / 1e12 * GPU_HOURS_PER_TRILLION_TOKENS


def total_gpu_hours() -> float:
    """With context extension and post-training: 2.788M. Research and ablations before the run aren't in it."""
    return pretraining_gpu_hours() + CONTEXT_EXTENSION_GPU_HOURS + POST_TRAINING_GPU_HOURS


def usd(gpu_hours: float) -> float:
    """Dollars at the report's rent: 5.576M for the total."""
    return gpu_hours * USD_PER_GPU_HOUR


def tokens_per_s_per_gpu() -> float:
    """Speed of pretraining on one H800 at the report's rate: 1,543."""
    return 1e12 / (GPU_HOURS_PER_TRILLION_TOKENS * 3600)
