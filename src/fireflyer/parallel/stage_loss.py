"""What a part of the model gives of the loss, for some rows, some tokens and some layers of a batch; all add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fireflyer.data.packing import Batch
from fireflyer.model.decoder import TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.parallel.context import SequencePart


@dataclass(frozen=True)
class StageResult:
    """What a stage makes of a micro-batch: its share of the loss, scalars to be summed, what its layers decided."""

    loss: Tensor
    values: dict[str, Tensor]
    routing: list[Routing]


StageLoss = Callable[[Batch, TrunkOutput, Tensor | None, SequencePart | None], StageResult]
"""Of whole rows, what was made of them, the head's weight (vocab, D), and the tokens that `out` is of (None: all).

Without a head's weight it is asked by a stage that isn't the last, whose `out` has nothing but the routing to take a
loss of.
"""
