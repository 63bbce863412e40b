"""`fireflyer plan CONFIG --placement`: where the experts of each layer lie, and how even that makes the ranks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.config import ModelConfig
    from fireflyer.parallel.placement import Cluster

_LAST_ROWS = 10
"""Lines of a run's experts.jsonl that are taken together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options beside plan's own; --count is how many ranks there are."""
    group = parser.add_argument_group("expert placement")
    group.add_argument(
        "--placement",
        nargs="?",
        const="",
        metavar="FILE",
        help="place the experts by their loads: a run's own, or JSON as {layer: [load of each expert]}",
    )
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that the ranks are on (default 1)")
    group.add_argument(
        "--redundant", type=int, metavar="N", help="slots beyond one an expert (default an eighth, as the report's)"
    )


def place(args: argparse.Namespace, config: ModelConfig) -> int:
    """Print the placement of every layer. Raises UserError."""
    from fireflyer.parallel.placement import Cluster, in_order, place_experts

    num_experts, ranks = config.n_routed_experts, args.count or 8
    if not num_experts:
        raise UserError(f"{args.config} has no routed experts to place")
    redundant = args.redundant
    if redundant is None:
        redundant = -(-num_experts // 8)
        redundant += -(num_experts + redundant) % ranks
    cluster = Cluster(num_experts + redundant, config.n_group, args.nodes, ranks)
    layers: dict[str, Any] = {}
    for layer, loads in _loads(args, num_experts).items():
        placed = place_experts(loads, cluster)
        before = None if num_experts % ranks else in_order(num_experts, ranks).imbalance(loads)
        layers[str(layer)] = {
            "experts": placed.experts,
            "imbalance": {"in_order": before, "placed": placed.imbalance(loads)},
        }
    facts = {"ranks": ranks, "nodes": args.nodes, "slots": cluster.slots, "layers": layers}
    print(json.dumps(facts) if args.json else _text(args.config, cluster, num_experts, layers))
    return 0


def _loads(args: argparse.Namespace, num_experts: int) -> dict[int, list[float]]:
    from fireflyer.checkpoint.run_folder import EXPERTS, read_metrics
    from fireflyer.parallel.placement import read_loads, run_loads

    path = Path(args.placement or args.config)
    if args.placement:
        loads = read_loads(path)
    elif (path / EXPERTS).is_file():
        loads = run_loads(read_metrics(path, name=EXPERTS), _LAST_ROWS)
    else:
        raise UserError(f"{path}: no {EXPERTS} in it; give a run's folder, or --placement FILE with the loads")
    found = len(next(iter(loads.values())))
    if found != num_experts:
        raise UserError(f"{path}: loads of {found} experts, but {args.config} has {num_experts} a layer")
    return loads


def _text(name: str, cluster: Cluster, num_experts: int, layers: dict[str, Any]) -> str:
    head = f"{name}: {num_experts} experts a layer in {cluster.slots} slots on {cluster.ranks} ranks"
    rows = [("layer", "in order", "placed", "experts by rank")]
    width = cluster.slots // cluster.ranks
    for layer, found in layers.items():
        before, after = found["imbalance"]["in_order"], found["imbalance"]["placed"]
        experts = found["experts"]
        by_rank = [" ".join(map(str, experts[first : first + width])) for first in range(0, len(experts), width)]
        rows.append((layer, "" if before is None else f"{before:.2f}", f"{after:.2f}", " | ".join(by_rank)))
    lines = [f"{layer:>5}  {before:>8}  {after:>6}  {experts}" for layer, before, after, experts in rows]
    return "\n".join([head, "load of the busiest rank over the mean:", "", *lines])
