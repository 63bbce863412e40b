"""What a training run tells while it goes: small frozen facts, from which a terminal, a test or a page draws.

The loop prints nothing. Out: one of these to `on_event`, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Notice:
    """Something worth a line: a tokenizer being trained, data that begins again, a damaged checkpoint passed over."""

    text: str


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on after `step` steps. FLOPs are of forward and backward, MTP's share included."""

    run_dir: Path
    step: int
    tokens: int
    total_steps: int
    total_tokens: int
    parameters: int
    flops_per_token: float
    device: str
    dtype: str
    threads: int


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step; the losses are means over its whole batch, before their weights.

    `loss` is the main model's cross entropy (nats), `mtp_loss` the mean over depths, `balance_loss` the sum over MoE
    layers, `grad_norm` before clipping, `max_vio` the worst layer's busiest expert over its mean load, minus 1;
    `tokens` are those seen after the step, `train_s` the wall time of the loop so far, over all resumptions.
    """

    step: int
    tokens: int
    loss: float
    mtp_loss: float
    balance_loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    max_vio: float
    batch_size: int
    epoch: int
    train_s: float


@dataclass(frozen=True)
class StepDone:
    """A step ended (every `log_every`-th is told); `total_steps` gives the time left."""

    metrics: StepMetrics
    total_steps: int


@dataclass(frozen=True)
class Evaluated:
    """Held-out text was scored with the weights after `step`: nats a label, bits a byte of text."""

    step: int
    eval_loss: float
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk; `seconds` from its snapshot to its last sync, most of them beside training."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The run is at its end; `already` when it had been before and nothing was done now."""

    run_dir: Path
    step: int
    already: bool


Event = Notice | Started | StepDone | Evaluated | Saved | Finished
