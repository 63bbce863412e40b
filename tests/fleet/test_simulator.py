"""The simulator: cases that a reader can follow with a pencil, books that balance, the same result twice;
the baselines by their rules; the workload's distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.fleet.baselines import Fifo, Ours, Priority, Scheduler
from fireflyer.fleet.decision import Settings
from fireflyer.fleet.figures import figures, modest_tasks
from fireflyer.fleet.scenario import Scenario
from fireflyer.fleet.simulator import Costs, Outcome, Simulation, even_shares
from fireflyer.fleet.workload import DAY_S, YEAR_S, Faults, Submission, Workload

COSTS = Costs(start_s=20.0, save_s=10.0, checkpoint_every_s=300.0, notice_s=60.0)
SETTINGS = Settings(min_slice_s=600.0, stop_s=60.0)


def task(task_id: str, user: str, num_nodes: int, work_s: float, at_s: float = 0.0, priority: int = 0) -> Submission:
    return Submission(task_id, user, num_nodes, work_s, at_s, priority)


def run(scheduler: Scheduler, zones: list[int], tasks: list[Submission], end_s: float, faults=()) -> Outcome:
    return Simulation(scheduler, zones, tasks, faults, end_s, COSTS, SETTINGS.half_life_s).run()


def ends(outcome: Outcome) -> dict[str, float | None]:
    return {job.submission.id: job.done_s for job in outcome.jobs}


def starts(outcome: Outcome) -> dict[str, float | None]:
    return {job.submission.id: job.first_s for job in outcome.jobs}


def test_a_task_alone_starts_works_and_ends():
    outcome = run(Ours(SETTINGS), [1], [task("t1", "u", 1, 1000.0, at_s=5.0)], 2000.0)
    assert starts(outcome) == {"t1": 5.0}
    assert ends(outcome) == {"t1": 5.0 + 20.0 + 1000.0}
    account = outcome.account
    assert (account.all, account.allocated, account.idle) == (2000.0, 1020.0, 980.0)
    assert (account.starting, account.saving, account.useful) == (20.0, 0.0, 1000.0)


def test_two_users_on_one_node_take_turns_and_each_switch_costs_a_save_and_a_start():
    outcome = run(Ours(SETTINGS), [1], [task("t1", "u", 1, 1000.0), task("t2", "v", 1, 1000.0, at_s=1.0)], 5000.0)
    assert starts(outcome) == {"t1": 0.0, "t2": 610.0}, "a slice, and 10 s for saving"
    # t1: 580 s of work in its first slice; t2's slice ends at 1210, saved at 1220; then the rest of each.
    assert ends(outcome) == {"t1": 1220.0 + 20.0 + 420.0, "t2": 1660.0 + 20.0 + 420.0}
    assert outcome.account.starting == 4 * 20.0
    assert outcome.account.saving == 2 * 10.0
    assert outcome.account.useful == pytest.approx(2000.0)


@pytest.mark.parametrize(("repair_s", "restart"), [(math.nan, "here"), (3600.0, "on the other node")])
def test_a_fault_costs_what_followed_the_last_save_and_the_time_until_it_is_noticed(repair_s, restart):
    faults = [(20.0 + 450.0, 0, repair_s if repair_s == repair_s else None)]
    outcome = run(Ours(SETTINGS), [2], [task("t1", "u", 1, 1000.0)], 5000.0, faults)
    # At the fault 450 s of work are done and 300 s of them saved; it is noticed a minute later, and 700 s are left.
    assert ends(outcome) == {"t1": 470.0 + 60.0 + 20.0 + 700.0}
    assert outcome.account.lost == 150.0 + 60.0
    assert outcome.account.down == (0.0 if restart == "here" else 3600.0 - 60.0)
    assert outcome.faults == 1


def test_fifo_serves_in_order_and_backfill_starts_what_does_not_delay_the_first_in_line():
    tasks = [task("t1", "u", 3, 1000.0), task("t2", "u", 4, 1000.0, 1.0)]
    tasks += [task("short", "v", 1, 900.0, 2.0), task("long", "v", 1, 2000.0, 3.0)]
    plain = run(Fifo(backfill=False), [4], tasks, 9000.0)
    assert starts(plain) == {"t1": 0.0, "t2": 1020.0, "short": 2040.0, "long": 2040.0}
    easy = run(Fifo(backfill=True), [4], tasks, 9000.0)
    assert starts(easy) == {"t1": 0.0, "t2": 1020.0, "short": 2.0, "long": 2040.0}


def test_priorities_stop_lower_ones_at_once_and_are_first_come_first_served_inside():
    tasks = [task("low", "u", 1, 1000.0, 0.0, priority=2), task("high", "u", 1, 100.0, 50.0, priority=5)]
    tasks += [task("same", "u", 1, 100.0, 60.0, priority=5)]
    outcome = run(Priority(), [1], tasks, 9000.0)
    assert starts(outcome) == {"low": 0.0, "high": 60.0, "same": 180.0}
    assert ends(outcome)["low"] == 300.0 + 20.0 + (1000.0 - 30.0)


@pytest.mark.parametrize("policy", ["ours", "fifo", "fifo-backfill", "priority"])
def test_the_books_balance_and_a_run_is_the_same_twice(policy):
    scenario = Scenario(40, 2.0, 1.2, 3, 1.0)
    result, occupancy = scenario.run(policy)
    share = result["share"]
    idle = share["reserved"] + share["unfit"] + share["nothing_waits"]
    assert share["allocated"] + idle == pytest.approx(1.0, abs=1e-9)
    parts = share["useful"] + share["starting"] + share["saving"] + share["lost"]
    assert parts == pytest.approx(share["allocated"], abs=1e-9)
    assert len(occupancy) == 2 * 144
    assert all(0 <= used <= 40 for _, used, _ in occupancy)
    assert Scenario(40, 2.0, 1.2, 3, 1.0).run(policy) == (result, occupancy)


def test_work_is_kept_whatever_interrupts_it():
    """Useful node-seconds are the work of what is done: nothing counts twice, nothing comes for free."""
    workload = Workload(max_nodes=16, median_s=1500.0, sigma=1.0, max_s=7200.0)
    tasks = workload.draw(20, 0.0, DAY_S, 1.1, 1)
    faults = Faults(node_faults_per_year=2e6, task_faults_per_year=2e6).draw(20, 0.0, DAY_S, 1)
    outcome = run(Ours(SETTINGS), [10, 10], [t for t in tasks if t.submitted_s >= 0], 20 * DAY_S, faults)
    assert outcome.faults > 50
    assert all(job.done_s is not None and job.left_s == 0.0 for job in outcome.jobs)
    work = sum(job.submission.num_nodes * job.submission.work_s for job in outcome.jobs)
    assert outcome.account.useful == pytest.approx(work, rel=1e-9)


def test_ours_serves_first_slices_sooner_and_more_evenly_than_the_others():
    scenario = Scenario(100, 4.0, 1.2, 0, 2.0)
    ours, fifo, priority = (scenario.run(policy)[0] for policy in ("ours", "fifo", "priority"))
    for other in (fifo, priority):
        assert ours["wait_modest_s"]["p99"] < other["wait_modest_s"]["p99"] / 10
        assert ours["fairness"]["least"] > other["fairness"]["least"]
    assert ours["allocated_of_usable"] > 0.98


def test_the_workload_asks_for_the_load_it_names_and_repeats():
    tasks = Workload().draw(200, 2 * DAY_S, 10 * DAY_S, 0.8, 5)
    assert tasks == Workload().draw(200, 2 * DAY_S, 10 * DAY_S, 0.8, 5)
    assert tasks != Workload().draw(200, 2 * DAY_S, 10 * DAY_S, 0.8, 6)
    asked = sum(
        t.num_nodes * max(0.0, min(t.submitted_s + t.work_s, 10 * DAY_S) - max(t.submitted_s, 0.0)) for t in tasks
    )
    assert asked == pytest.approx(0.8 * 200 * 10 * DAY_S, rel=1e-6)
    assert [t.submitted_s for t in tasks] == sorted(t.submitted_s for t in tasks)
    assert min(t.submitted_s for t in tasks) >= -2 * DAY_S


def test_the_workloads_distributions():
    workload, rng = Workload(), np.random.default_rng(0)
    sizes = workload._sizes(rng, 200_000, 1250)
    odds = np.array([2.0 ** (-0.6 * k) for k in range(9)])
    counts = [int((sizes == 2**k).sum()) for k in range(9)]
    assert np.allclose(counts, 200_000 * odds / odds.sum(), rtol=0.1)
    lengths = workload._lengths(rng, 200_000)
    assert np.median(lengths) == pytest.approx(3600.0, rel=0.03)
    assert lengths.min() == 120.0
    assert lengths.max() <= 21 * DAY_S
    hours = np.histogram(workload._times(rng, 240_000, 0.0, 10 * DAY_S) % DAY_S / 3600, bins=24, range=(0, 24))[0]
    assert hours[5:7].mean() / hours[17:19].mean() == pytest.approx(3.0, rel=0.1), "1.5 at its peak, 0.5 at its lowest"


def test_faults_come_at_the_published_rates():
    faults = Faults().draw(1250, 0.0, YEAR_S, 0)
    nodes = sum(repair is not None for _, _, repair in faults)
    assert nodes == pytest.approx(12_970 * 0.447 + 108, rel=0.05)
    assert len(faults) - nodes == pytest.approx(12_970 * 0.527 + 213, rel=0.05)
    assert {node for _, node, _ in faults} <= set(range(1250))


def test_even_shares_against_filling_bit_by_bit():
    wanted = {"a": 3, "b": 50, "c": 10, "d": 40}
    level = dict.fromkeys(wanted, 0.0)
    left = 60.0
    while left > 1e-6:
        hungry = [user for user in wanted if level[user] < wanted[user] - 1e-9]
        for user in hungry:
            step = min(0.001, wanted[user] - level[user], left / len(hungry))
            level[user] += step
            left -= step
    assert even_shares(wanted, 60) == pytest.approx(level, abs=0.01)
    assert even_shares({"a": 1}, 5) == {"a": 1.0}


def test_modest_tasks_are_those_inside_an_even_share():
    tasks = [task("t1", "u", 6, 100.0), task("t2", "v", 5, 100.0, 1.0), task("t3", "v", 1, 100.0, 2.0)]
    tasks.append(task("t4", "v", 5, 100.0, 102.0))
    assert modest_tasks(tasks, 10) == {"t1", "t2", "t4"}


def test_figures_of_nothing():
    outcome = run(Ours(SETTINGS), [2], [], 100.0)
    result = figures(outcome, set())
    assert result["share"]["nothing_waits"] == 1.0
    assert result["wait_all_s"] == {"tasks": 0, "p50": None, "p99": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1.0, 1.0, 0, 0.0), "nodes = 1"),
        ((9, 0.0, 1.0, 0, 0.0), "days = 0"),
        ((9, 1.0, -1.0, 0, 0.0), "load = -1"),
        ((9, 1.0, 99.0, 0, 0.0), "at most"),
    ],
)
def test_a_scenario_that_makes_no_cluster_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Scenario(*arguments)
