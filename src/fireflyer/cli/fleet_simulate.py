"""`fireflyer fleet simulate`: a month of a cluster in a minute, beside other schedulers: a table, a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError

POLICIES = ("ours", "fifo", "fifo-backfill", "priority")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--days", type=float, default=30.0, metavar="D", help="measured days (default 30)")
    parser.add_argument("--warm-up", type=float, default=5.0, metavar="D", help="days before these (default 5)")
    parser.add_argument(
        "--load", type=float, default=1.0, metavar="L", help="work that comes, over the cluster's own (1)"
    )
    parser.add_argument("--nodes", type=int, default=1250, metavar="N", help="of 8 GPUs, in two zones (default 1250)")
    parser.add_argument("--policy", default="ours", metavar="P,...", help=f"of {', '.join(POLICIES)} (default ours)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the workload and the faults (default 0)")
    parser.add_argument("--plot", metavar="FILE", help="a picture, as .svg or .png (pip install 'fireflyer[plot]')")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    names = [name.strip() for name in args.policy.split(",") if name.strip()]
    for name in names:
        if name not in POLICIES:
            raise UserError(f"--policy {args.policy}: no policy {name!r}; there are {', '.join(POLICIES)}")
    if args.plot is not None and Path(args.plot).suffix not in (".svg", ".png"):
        raise UserError(f"--plot {args.plot}: its name has to end with .svg or .png")
    from fireflyer.fleet.scenario import Scenario

    scenario = Scenario(args.nodes, args.days, args.load, args.seed, args.warm_up)
    results, occupancy = {}, {}
    for name in names:
        print(f"{name}: {args.days:g} days of {args.nodes} nodes ...", file=sys.stderr, flush=True)
        results[name], occupancy[name] = scenario.run(name)
    if args.plot is not None:
        from fireflyer.fleet.pictures import draw

        draw(Path(args.plot), scenario.title, results, occupancy, args.nodes)
    if args.json:
        print(json.dumps({"scenario": scenario.title, "policies": results}))
    else:
        print(table(scenario.title, results))
    return 0


def table(title: str, results: dict[str, dict[str, Any]]) -> str:
    """One column a policy."""
    rows = [("", list(results))]

    def row(what: str, cell: Any) -> None:
        rows.append((what, [cell(result) for result in results.values()]))

    def percent(*keys: str) -> Any:
        def cell(result: dict[str, Any]) -> str:
            value: Any = result
            for key in keys:
                value = value[key]
            return f"{value:.2%}"

        return cell

    row("node-seconds allocated", percent("share", "allocated"))
    for part, what in (
        ("useful", "useful"),
        ("starting", "starting"),
        ("saving", "saving"),
        ("lost", "lost by faults"),
    ):
        row(f"  {what}", percent("share", part))
    row("  of what anybody could use", percent("allocated_of_usable"))
    row("idle: nothing waits", percent("share", "nothing_waits"))
    row("idle: too few together", percent("share", "unfit"))
    row("idle: freed for a gang", percent("share", "reserved"))
    for nodes in next(iter(results.values()))["wait_s"]:
        row(f"first slice after, {nodes} nodes", lambda r, nodes=nodes: _spread(r["wait_s"][nodes]))
    row("  of modest users", lambda r: _spread(r["wait_modest_s"]))
    row("never started", lambda r: str(r["never_started"]))
    row("slowdown, mean", lambda r: "-" if r["slowdown"]["mean"] is None else f"{r['slowdown']['mean']:.1f}")
    row("fairness (Jain's index)", lambda r: f"{r['fairness']['jain']:.3f}")
    row("least share of an even one", lambda r: f"{r['fairness']['least']:.2f}")
    row("faults; node-hours lost", lambda r: f"{r['faults']}; {r['lost_node_hours']:,.0f}")
    row("slices", lambda r: f"{r['slices']:,}")
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(results))]
    lines = [
        f"{what:28}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)) for what, cells in rows
    ]
    legend = "First slices: median and 99 of 100. Modest users ask for no more than an even share."
    return "\n".join([title, *(line.rstrip() for line in lines), legend])


def _spread(spread: dict[str, Any]) -> str:
    return "-" if spread["p50"] is None else f"{duration(spread['p50'])}, {duration(spread['p99'])}"


def duration(seconds: float) -> str:
    """3 s, 4 min, 5 h, 6 d."""
    for unit, size in (("d", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= 2.0 * size or (unit == "min" and seconds >= size):
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
