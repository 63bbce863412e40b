"""Where a layer's routed experts lie, and the busiest of them twice: DeepSeek's expert placement (EPLB; report 3.4).

In: how many tokens chose each expert, from a run or a server; slots, groups, nodes and ranks. Out: which expert each
slot holds. A slot is room for one expert's weights; a rank has as many slots as every other. With more slots than
experts the busiest get several, its replicas, among which tokens are spread. Where the nodes divide the expert groups,
groups stay together on a node (group-limited routing then keeps a token's traffic within few nodes) and are balanced
over the nodes first; otherwise all slots are one pool. Plain numbers, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from fireflyer.errors import UserError

SPREAD = 23333
"""What DeepSeek's kernels multiply a token's number by when they choose among replicas (TileKernels)."""


@dataclass(frozen=True)
class Cluster:
    """slots: of one layer, over all ranks. groups: of experts, as n_group. nodes: machines, each with as many ranks."""

    slots: int
    groups: int
    nodes: int
    ranks: int


@dataclass(frozen=True)
class Placement:
    """One layer: the expert in each slot; rank r has slots r·n to (r+1)·n."""

    experts: tuple[int, ...]
    ranks: int

    @property
    def slots_per_rank(self) -> int:
        return len(self.experts) // self.ranks

    @property
    def num_experts(self) -> int:
        return len(self.replicas)

    @cached_property
    def replicas(self) -> tuple[tuple[int, ...], ...]:
        """By expert, its slots in order."""
        slots: list[list[int]] = [[] for _ in range(max(self.experts) + 1)]
        for slot, expert in enumerate(self.experts):
            slots[expert].append(slot)
        return tuple(map(tuple, slots))

    def slot_of(self, expert: int, token: int, rank: int) -> int:
        """Which replica takes a rank's token: spread over them, the same one whenever it is asked."""
        slots = self.replicas[expert]
        return slots[(rank + token * SPREAD) % len(slots)]

    def rank_loads(self, loads: Sequence[float]) -> list[float]:
        """What each rank gets where an expert's load is shared evenly by its replicas."""
        shares = [load / len(slots) for load, slots in zip(loads, self.replicas, strict=True)]
        width = self.slots_per_rank
        return [sum(shares[expert] for expert in self.experts[r * width : (r + 1) * width]) for r in range(self.ranks)]

    def imbalance(self, loads: Sequence[float]) -> float:
        """The busiest rank's load over the mean: 1 is even, and a step takes as long as the busiest rank."""
        per_rank = self.rank_loads(loads)
        return max(per_rank) / fmean(per_rank) if any(per_rank) else 1.0


def in_order(num_experts: int, ranks: int) -> Placement:
    """Experts as they are numbered, none of them twice: what a balanced placement is compared with."""
    if num_experts % ranks:
        raise UserError(f"{ranks} ranks don't divide {num_experts} experts; add slots for redundant ones")
    return Placement(tuple(range(num_experts)), ranks)


def place_experts(loads: Sequence[float], cluster: Cluster) -> Placement:
    """The placement of one layer by the loads of its experts. Raises UserError for numbers that don't divide."""
    check_cluster(len(loads), cluster)
    if cluster.groups % cluster.nodes == 0:
        return _place(loads, cluster)
    return _place(loads, Cluster(cluster.slots, 1, 1, cluster.ranks))


def check_cluster(num_experts: int, cluster: Cluster) -> None:
    """Raises UserError with the number that doesn't divide."""
    for name, value in (("nodes", cluster.nodes), ("ranks", cluster.ranks), ("groups", cluster.groups)):
        if value < 1:
            raise UserError(f"{name} = {value}; there must be 1 at least")
    if num_experts % cluster.groups:
        raise UserError(f"{cluster.groups} groups don't divide {num_experts} experts; give the model's n_group")
    if cluster.slots < num_experts:
        raise UserError(
            f"{cluster.slots} slots are fewer than the layer's {num_experts} experts; every one needs a place"
        )
    if cluster.ranks % cluster.nodes:
        raise UserError(f"{cluster.nodes} nodes don't divide {cluster.ranks} ranks; give whole nodes")
    if cluster.slots % cluster.ranks:
        more = cluster.slots + -cluster.slots % cluster.ranks
        raise UserError(f"{cluster.ranks} ranks don't divide {cluster.slots} slots; {more} would do")


def _place(loads: Sequence[float], cluster: Cluster) -> Placement:
    """Groups to nodes, replicas within a node, then slots to the node's ranks."""
    group_size, nodes = len(loads) // cluster.groups, cluster.nodes
    groups = [range(first, first + group_size) for first in range(0, len(loads), group_size)]
    experts: list[int] = []
    for packed in pack_evenly([sum(loads[e] for e in group) for group in groups], nodes):
        here = [expert for group in packed for expert in groups[group]]
        slots = replicate([loads[expert] for expert in here], cluster.slots // nodes)
        counts = [slots.count(number) for number in range(len(here))]
        shares = [loads[here[number]] / counts[number] for number in slots]
        for rank in pack_evenly(shares, cluster.ranks // nodes):
            experts += [here[slots[slot]] for slot in rank]
    return Placement(tuple(experts), cluster.ranks)


def pack_evenly(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Items into packs of equal number and nearly equal weight: the heaviest first, each to the lightest pack that has
    room. By pack, the items in the order in which they came."""
    size = len(weights) // packs
    assert size * packs == len(weights)
    if size == 1:
        return [[item] for item in range(packs)]
    filled: list[list[int]] = [[] for _ in range(packs)]
    totals = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((pack for pack in range(packs) if len(filled[pack]) < size), key=totals.__getitem__)
        filled[pack].append(item)
        totals[pack] += weights[item]
    return filled


def replicate(loads: Sequence[float], slots: int) -> list[int]:
    """The expert of each slot: all of them once, then whichever has the most load a replica, again and again."""
    experts, counts = list(range(len(loads))), [1] * len(loads)
    for _ in range(slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda expert: loads[expert] / counts[expert])
        experts.append(busiest)
        counts[busiest] += 1
    return experts


def run_loads(rows: Sequence[Mapping[str, Any]], last: int = 1) -> dict[int, list[float]]:
    """By MoE layer, each expert's share over an even one (1 is even), the mean of the last rows of a run's
    experts.jsonl. Rows that no other program could have written are refused with UserError."""
    if not rows:
        raise UserError("no loads of experts yet; the run has to write its first line of experts.jsonl")
    taken = rows[-last:]
    try:
        layers = {int(layer) for layer in taken[-1]["load"]}
        return {
            layer: [fmean(each) for each in zip(*(row["load"][str(layer)] for row in taken), strict=True)]
            for layer in sorted(layers)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"experts.jsonl: not as training writes it ({error!r})") from None


def read_loads(path: Path) -> dict[int, list[float]]:
    """Loads in a JSON file: {"3": [12, 40, ...], ...} by MoE layer, in tokens or in shares. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        loads = {int(layer): [float(load) for load in counts] for layer, counts in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: no loads by layer, as {{"3": [12, 40, 7, 9]}} ({error})') from None
    if not loads or len({len(counts) for counts in loads.values()}) > 1:
        raise UserError(f"{path}: every layer needs as many loads as the model has experts")
    if any(not 0 <= load < float("inf") for counts in loads.values() for load in counts):
        raise UserError(f"{path}: a load is below 0 or no number")
    return dict(sorted(loads.items()))
