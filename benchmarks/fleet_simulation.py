"""A month of 10,000 GPUs under our policy and three others, at three loads; how long the simulation itself takes."""

from __future__ import annotations

import time
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from fireflyer.cli.fleet_simulate import duration
from fireflyer.fleet.pictures import draw
from fireflyer.fleet.scenario import Scenario

NODES, DAYS, WARM_UP_DAYS = 1250, 30.0, 5.0
LOADS = {"load_80": 0.8, "load_100": 1.0, "load_130": 1.3}
POLICIES = ("ours", "fifo", "fifo-backfill", "priority")
SEEDS = (1, 2, 3)  # of our policy at load 1.0, beside seed 0
PARTS = ("allocated", "useful", "starting", "saving", "lost", "nothing_waits", "unfit", "reserved")


def main() -> Proof:
    """Pictures go to docs/fleet-simulation-*.svg, one a load."""
    results: dict[str, dict[str, Any]] = {}
    for name, load in LOADS.items():
        scenario = Scenario(NODES, DAYS, load, 0, WARM_UP_DAYS)
        runs = {policy: _timed(scenario, policy) for policy in POLICIES}
        results[name] = {policy: result for policy, (result, _) in runs.items()}
        occupancy = {policy: samples for policy, (_, samples) in runs.items()}
        path = ROOT / "docs" / f"fleet-simulation-{name.replace('_', '-')}.svg"
        draw(path, scenario.title, results[name], occupancy, NODES)
    seeds = {"0": results["load_100"]["ours"]}
    for seed in SEEDS:
        seeds[str(seed)], _ = _timed(Scenario(NODES, DAYS, 1.0, seed, WARM_UP_DAYS), "ours")
    for result in [*seeds.values(), *(result for runs in results.values() for result in runs.values())]:
        result["fairness"].pop("by_user", None)
    figures = {**results, "seeds": seeds}
    return Proof(figures, _tables(results, seeds), missed=_missed(results, seeds))


def _timed(scenario: Scenario, policy: str) -> tuple[dict[str, Any], Any]:
    begun = time.perf_counter()
    result, occupancy = scenario.run(policy)
    return {**result, "simulated_in_s": time.perf_counter() - begun}, occupancy


def _tables(results: dict[str, dict[str, Any]], seeds: dict[str, Any]) -> dict[str, Table]:
    names = (
        "held",
        "useful",
        "starting",
        "saving",
        "lost by faults",
        "nothing waits",
        "too few together",
        "for a gang",
    )
    time_rows = [
        [f"{LOADS[load]:g}", policy, *(f"{result['share'][part]:.2%}" for part in PARTS)]
        for load, runs in results.items()
        for policy, result in runs.items()
    ]
    fair_rows = [
        [
            f"{LOADS[load]:g}",
            policy,
            f"{result['fairness']['jain']:.3f}",
            f"{result['fairness']['least']:.2f}",
            f"{result['slowdown']['mean']:.1f}",
            f"{result['done']:,}",
            result["never_started"],
            f"{result['lost_node_hours']:,.0f}",
        ]
        for load, runs in results.items()
        for policy, result in runs.items()
    ]
    fair = ("load", "policy", "Jain's index", "least over even", "slowdown", "done", "never started", "node-hours lost")
    seed_rows = [
        [
            seed,
            *(f"{result['share'][part]:.2%}" for part in ("allocated", "nothing_waits")),
            f"{result['allocated_of_usable']:.2%}",
            _pair(result["wait_all_s"]),
            f"{result['simulated_in_s']:.0f} s",
        ]
        for seed, result in seeds.items()
    ]
    seed_columns = [
        "seed",
        "held",
        "nothing waits",
        "held of what anybody could use",
        "wait, p50 and p99",
        "simulated in",
    ]
    waits = {load.replace("load", "waits"): _waits(runs) for load, runs in results.items()}
    return {
        "time": Table(["load", "policy", *names], time_rows),
        "fairness": Table(fair, fair_rows),
        "seeds": Table(seed_columns, seed_rows),
        **waits,
    }


def _waits(runs: dict[str, Any]) -> Table:
    rows = [
        [
            f"{nodes} nodes",
            runs["ours"]["wait_s"][nodes]["tasks"],
            *(_pair(run["wait_s"][nodes]) for run in runs.values()),
        ]
        for nodes in runs["ours"]["wait_s"]
    ]
    for key, what in (("wait_modest_s", "modest users"), ("wait_all_s", "all")):
        rows.append([what, runs["ours"][key]["tasks"], *(_pair(run[key]) for run in runs.values())])
    return Table(["first slice, p50 and p99", "tasks", *runs], rows)


def _pair(spread: dict[str, Any]) -> str:
    return "-" if spread["p50"] is None else f"{duration(spread['p50'])}, {duration(spread['p99'])}"


def _missed(results: dict[str, dict[str, Any]], seeds: dict[str, Any]) -> list[str]:
    missed = []
    took = results["load_100"]["ours"]["simulated_in_s"]
    if took >= 120.0:
        missed.append(f"30 days at 10,000 GPUs simulated in under 2 minutes: took {took:.0f} s")
    for seed, result in seeds.items():
        usable = result["allocated_of_usable"]
        if usable < 0.99:
            missed.append(f"99 % of the node-seconds that anybody could use, at load 1.0: {usable:.2%} (seed {seed})")
    return missed
