"""What a training run tells while it goes: small frozen facts, from which a terminal, a test or a page draws.

The loop prints nothing. Out: one of these to `on_event`, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


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
    """One optimizer step.

    `values` are the objective's, `loss` among them. Pretraining's are means over the whole batch, before their weights:
    `loss` the main model's cross entropy (nats), `mtp_loss` the mean over depths, `balance_loss` the sum over MoE
    layers. `grad_norm` is before clipping, `max_vio` the worst layer's busiest expert over its mean load, minus 1;
    `tokens` are those seen after the step, `train_s` the wall time of the loop so far, over all resumptions,
    `peak_memory_bytes` the process's.
    """

    step: int
    tokens: int
    values: dict[str, float]
    lr: float
    grad_norm: float
    tokens_per_s: float
    max_vio: float
    batch_size: int
    epoch: int
    train_s: float
    peak_memory_bytes: int

    @property
    def loss(self) -> float:
        return self.values["loss"]

    def row(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        del row["values"]
        return {"step": self.step, "tokens": self.tokens, **self.values, **row}


@dataclass(frozen=True)
class StepDone:
    """A step ended (every `log_every`-th is told); `total_steps` gives the time left."""

    metrics: StepMetrics
    total_steps: int


@dataclass(frozen=True)
class Evaluated:
    """Held-out data was scored with the weights after `step`; pretraining's `values` are `eval_loss` (nats a label),
    `bits_per_byte` of text and `mtp_acceptance`."""

    step: int
    values: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on disk; `seconds` from its snapshot to its last sync, most of them beside training."""

    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class Finished:
    """The run is at its end; `already` when it had been before and nothing was done now.

    adapts: the checkpoint beside which its adapters are to be read; None where it trained a whole model.
    """

    run_dir: Path
    step: int
    already: bool
    adapts: str | None = None


Event = Notice | Started | StepDone | Evaluated | Saved | Finished
