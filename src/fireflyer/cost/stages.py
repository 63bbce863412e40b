"""Which layers a pipeline's ranks hold: as even as whole layers allow, beside the head and MTP. Arithmetic, no torch.

The embedding lies in the first stage, the head and the MTP modules in the last; DualPipe and DualPipeV put both on one
rank (V3 report, section 3.2.1). In: number of layers, the schedule, what the tail weighs in layers. Out: layers a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.cost.pipeline import Pipeline


@dataclass(frozen=True)
class RankLayers:
    """Layers of one rank, dense and with experts; is the embedding on it, are the head and MTP; its number."""

    dense: int
    moe: int
    embedding: bool
    tail: bool
    rank: int = 0


def place_layers(num_dense: int, num_layers: int, pipeline: Pipeline, tail: float) -> list[RankLayers] | None:
    """Ranks that differ: the first two and the last two, of those there are; None: too many stages.

    Ranks that hold the same stages (DualPipe's r and ranks - 1 - r) are one. `tail`: time of head and MTP, in layers.
    """
    holders = pipeline.ranks // pipeline.copies
    stages_each = pipeline.stages // holders
    tail_first = pipeline.overlaps  # the first rank also holds the last stage
    if holders == 1:
        return [RankLayers(num_dense, num_layers - num_dense, embedding=True, tail=True)]
    fewest = 1 if tail_first or stages_each > 1 else 0
    others = holders - 1
    most = num_layers - others * stages_each
    if most < fewest:
        return None
    beside_tail = min(
        range(fewest, most + 1), key=lambda count: (max(count + tail, -(-(num_layers - count) // others)), count)
    )
    share, extra = divmod(num_layers - beside_tail, others)
    counts = [
        share + (index >= others - extra) for index in range(others)
    ]  # later ones, which hold less else, take one more
    counts = [beside_tail, *counts] if tail_first else [*counts, beside_tail]
    return _representatives(counts, num_dense, stages_each, tail_first)


def _representatives(counts: list[int], num_dense: int, stages_each: int, tail_first: bool) -> list[RankLayers]:
    last = len(counts) - 1
    dense_left = num_dense
    ranks = []
    for index, count in enumerate(counts):
        # A rank's first stage comes first in the model; with several stages a rank, dense layers can only be in there.
        room = -(-count // stages_each)
        dense = min(dense_left, room)
        dense_left -= dense
        tail = index == (0 if tail_first else last)
        ranks.append(RankLayers(dense, count - dense, embedding=index == 0, tail=tail, rank=index))
    return [ranks[index] for index in sorted({0, 1, last - 1, last})]
