"""A cluster, a load and a seed: every scheduler meets the same submissions and the same faults."""

from __future__ import annotations

from typing import Any

from fireflyer.errors import UserError
from fireflyer.fleet.baselines import Fifo, Ours, Priority, Scheduler
from fireflyer.fleet.decision import Settings
from fireflyer.fleet.figures import figures, modest_tasks
from fireflyer.fleet.simulator import Costs, Simulation
from fireflyer.fleet.workload import DAY_S, Faults, Workload


class Scenario:
    """Two zones of equal size. Raises UserError where a number makes no cluster."""

    def __init__(self, num_nodes: int, days: float, load: float, seed: int, warm_up_days: float) -> None:
        for name, value, least in (
            ("nodes", num_nodes, 2),
            ("days", days, 0.1),
            ("load", load, 0.01),
            ("seed", seed, 0),
        ):
            if not value >= least:
                raise UserError(f"{name} = {value}: at least {least} is needed")
        if not (load <= 10.0 and days <= 1000.0 and num_nodes <= 100_000 and 0.0 <= warm_up_days <= 1000.0):
            raise UserError(
                "at most 10 times the load, 1,000 days (as many to warm up) and 100,000 nodes are simulated"
            )
        self.zones = [num_nodes - num_nodes // 2, num_nodes // 2]
        self.end_s = days * DAY_S
        self.submissions = Workload().draw(num_nodes, warm_up_days * DAY_S, self.end_s, load, seed)
        self.faults = Faults().draw(num_nodes, -warm_up_days * DAY_S, self.end_s, seed)
        self.modest = modest_tasks(self.submissions, num_nodes)
        self.title = (
            f"{num_nodes} nodes x 8 GPUs in two zones, {days:g} days at {load:g} times their capacity, seed {seed}"
        )

    def run(self, policy: str) -> tuple[dict[str, Any], list[tuple[float, int, int]]]:
        """The figures, and the occupancy over time."""
        settings = Settings()
        schedulers: dict[str, Scheduler] = {
            "ours": Ours(settings),
            "fifo": Fifo(backfill=False),
            "fifo-backfill": Fifo(backfill=True),
            "priority": Priority(),
        }
        simulation = Simulation(
            schedulers[policy], self.zones, self.submissions, self.faults, self.end_s, Costs(), settings.half_life_s
        )
        outcome = simulation.run()
        return figures(outcome, self.modest), outcome.occupancy
