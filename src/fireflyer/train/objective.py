"""What a run learns from, and what it minimises: the seam between the one loop and pretraining, SFT, DPO and GRPO.

The loop asks an objective for a batch, takes the gradient of the batch's parts one by one, steps, and keeps the
objective's state with each checkpoint. What a batch is, only the objective knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from fireflyer.model.decoder import TrunkOutput
from fireflyer.model.experts import Routing

BatchT = TypeVar("BatchT")

Trunk = Callable[..., TrunkOutput]
"""`Decoder.trunk`, or its compiled form."""


@dataclass(frozen=True)
class Part:
    """One forward pass over a part of a batch.

    The gradients of `loss` add up over the batch's parts to the batch's, and so do the `values`, scalars without a
    gradient: `loss` among them, and whatever else the objective measures. They become the step's metrics. Where the
    objective has taken the gradient itself, `loss` has none.
    """

    loss: Tensor
    values: dict[str, Tensor]
    routing: list[Routing]
    last: bool = True
    """Whether no further part of the batch comes, where the objective may be shared out over ranks."""


@dataclass(frozen=True)
class Evaluation:
    """values: into the step's metrics. samples: texts to read, each with at least `prompt` and `text`."""

    values: dict[str, float]
    samples: list[dict[str, Any]] = field(default_factory=list)


class Objective(Protocol, Generic[BatchT]):
    """Everything in it that moves on is in its state: a run that is killed and goes on sees the same batches."""

    watches_loss: bool
    """Whether the loss is a cross entropy, so that one above that of a guess tells of a run gone wrong."""

    @property
    def epoch(self) -> int:
        """Passes through the data that are over."""
        ...

    def next_batch(self, batch_size: int) -> BatchT: ...

    def size(self, batch: BatchT) -> tuple[int, int]:
        """(sequences, tokens) of a batch."""
        ...

    def parts(self, batch: BatchT, trunk: Trunk, tokens: int) -> Iterator[Part]:
        """The batch's parts; the loop takes the gradient of each before it asks for the next. tokens: seen before."""
        ...

    def metrics(self, batch: BatchT, sums: dict[str, float]) -> dict[str, float]:
        """The step's metrics from the summed values of its parts."""
        ...

    def tensors(self, batch: BatchT) -> dict[str, Tensor]:
        """The batch by name, to be kept where a step fails."""
        ...

    def evaluate(self) -> Evaluation | None:
        """Score held-out data; changes nothing. None where there is none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
