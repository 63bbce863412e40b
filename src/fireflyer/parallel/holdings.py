"""Who holds what in a layout: for people who want to see it before they start the ranks. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import count_parameters
from fireflyer.parallel.layout import Layout
from fireflyer.parallel.stages import StagePlan

_NUMBER_BYTES = 4
"""Weights, gradients and AdamW's two moments are fp32."""


@dataclass(frozen=True)
class Holding:
    """One rank's place and share. Bytes are those of a step at work, without activations and what torch copies."""

    rank: int
    layers: list[tuple[int, int]]
    """Of each of its stages: from, up to (not with it). The last stage has the head and the MTP layers besides."""
    rows: int
    """Which of dp shares of the batch's sequences."""
    tokens: int
    """Which of cp parts of each sequence."""
    experts: tuple[int, int]
    """Of every MoE layer that it has: from, up to (not with it)."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def holdings(layout: Layout, config: ModelConfig, plan: StagePlan) -> list[Holding]:
    """By rank. plan: of layout.pp ranks."""
    held = []
    for rank in range(layout.world):
        line, place = divmod(rank, layout.data_ranks)
        stages = plan.stages_of(line)
        counted = [_count(config, plan, stage) for stage in stages]
        dense, experts = sum(each[0] for each in counted), sum(each[1] for each in counted)
        whole = (dense + experts // layout.ep) * _NUMBER_BYTES
        share = (dense + experts) * _NUMBER_BYTES // layout.data_ranks
        per_rank = config.n_routed_experts // layout.ep
        first = place % layout.ep * per_rank
        held.append(
            Holding(
                rank=rank,
                layers=[(plan.layers[stage].start, plan.layers[stage].stop) for stage in stages],
                rows=place // layout.cp,
                tokens=place % layout.cp,
                experts=(first, first + per_rank),
                weights_bytes=whole if layout.zero < 3 else share,
                gradients_bytes=whole if layout.zero < 2 else share,
                optimizer_bytes=2 * share,
            )
        )
    return held


def _count(config: ModelConfig, plan: StagePlan, stage: int) -> tuple[int, int]:
    """A stage's parameters: those that all its ranks have, and the routed experts'."""
    counts, depths = count_parameters(config), config.num_nextn_predict_layers
    last = stage == len(plan.layers) - 1
    sparse = sum(map(config.is_moe, plan.layers[stage])) + (
        depths * config.is_moe(config.num_hidden_layers) if last else 0
    )
    experts = sparse * config.n_routed_experts * counts.routed_expert
    layers = 0
    for layer in plan.layers[stage]:
        feed_forward = counts.moe_ffn_layer if config.is_moe(layer) else counts.dense_ffn_layer
        layers += counts.attention_layer + 2 * config.hidden_size + feed_forward
    outer = counts.embedding if stage == 0 else 0
    if last:
        outer += counts.head + config.hidden_size + counts.mtp
        if stage and (depths or config.tie_word_embeddings):
            outer += counts.embedding  # a copy of the first stage's
    return layers + outer - experts, experts


def describe_holdings(layout: Layout, held: list[Holding], most: int = 16) -> str:
    """A table for people; of many ranks the first ones."""
    head = ("rank", "layers", "rows", "tokens", "experts", "weights", "gradients", "AdamW")
    cells: list[tuple[str, ...]] = [head]
    for each in held[:most]:
        layers = " ".join(_span(*span) for span in each.layers)
        places = (str(each.rank), layers, f"{each.rows + 1}/{layout.dp}")
        experts = _span(*each.experts)
        sizes = map(_size, (each.weights_bytes, each.gradients_bytes, each.optimizer_bytes))
        cells.append((*places, f"{each.tokens + 1}/{layout.cp}", experts, *sizes))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    if len(held) > most:
        lines.append(f"... and {len(held) - most:,} more")
    numbers = f"pp {layout.pp} x dp {layout.dp} x cp {layout.cp}, ep {layout.ep}, zero {layout.zero}"
    return "\n".join([f"{layout.world:,} ranks: {numbers}", *lines])


def _span(start: int, stop: int) -> str:
    if stop - start < 2:
        return str(start) if stop > start else "none"
    return f"{start}-{stop - 1}"


def _size(number: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1024:,.1f} KiB"
