"""The policy's rules one by one, on states small enough to see the right answer."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from fireflyer.errors import UserError
from fireflyer.fleet.decision import Settings
from fireflyer.fleet.fair_share import Usage, decayed
from fireflyer.fleet.placement import Board
from fireflyer.fleet.policy import check_size, decide
from fireflyer.fleet.state import FleetState, Node, Reservation, Task
from fireflyer.fleet.turns import turns

S = Settings(min_slice_s=10.0, stop_s=3.0, half_life_s=1000.0, full_slice=5.0, tick_s=5.0)


def zone(name: str, count: int) -> list[Node]:
    return [Node(f"{name}{i}", name) for i in range(count)]


def waits(task_id: str, user: str, num_nodes: int = 1, since_s: float = 0.0, **more) -> Task:
    return Task(task_id, user, num_nodes, since_s, **more)


def runs(task_id: str, user: str, nodes: str, since_s: float = 0.0, **more) -> Task:
    names = tuple(nodes.split())
    return Task(task_id, user, len(names), since_s, "running", names, num_slices=1, **more)


def had(node_seconds: float, now_s: float, last_turn_s: float | None = None) -> Usage:
    return Usage(node_seconds, now_s, now_s if last_turn_s is None else last_turn_s)


# Order


def test_the_least_served_user_comes_first():
    state = FleetState(zone("a", 1), [waits("t1", "u1"), waits("t2", "u2")], {"u1": had(500, 0), "u2": had(400, 0)})
    assert list(decide(state, 0.0, S).starts) == ["t2"]


def test_a_weight_divides_what_a_user_had():
    usage = {"u1": had(500, 0), "u2": had(400, 0)}
    state = FleetState(zone("a", 1), [waits("t1", "u1"), waits("t2", "u2")], usage)
    heavy = Settings(min_slice_s=10.0, stop_s=3.0, half_life_s=1000.0, weights={"u1": 2.0})
    assert list(decide(state, 0.0, heavy).starts) == ["t1"]


def test_a_users_own_tasks_take_turns_by_how_long_they_have_waited():
    tasks = [waits("t1", "u1", since_s=5.0), waits("t2", "u1", since_s=3.0), waits("t3", "u1", since_s=4.0)]
    starts = decide(FleetState(zone("a", 2), tasks), 6.0, S).starts
    assert {task: start.turn for task, start in starts.items()} == {"t2": True, "t3": False}


def test_a_task_that_never_ran_goes_before_its_users_others_until_their_turn_is_due():
    old, new = waits("t1", "u1", since_s=14.0, num_slices=1), waits("t2", "u1", since_s=15.0)
    busy = [runs(f"r{i}", "u2", f"a{i}", since_s=14.0) for i in range(1, 40)]
    starts = decide(crowded(16.0, *busy, old, new, u1=0.0, u2=0.0), 16.0, S).starts
    assert [(task, start.turn) for task, start in starts.items()] == [("t2", False)]
    starts = decide(FleetState(zone("a", 1), [old, new]), 16.0, S).starts
    assert [(task, start.turn) for task, start in starts.items()] == [("t1", True)]


def test_one_decision_divides_free_nodes_among_users():
    tasks = [waits(f"t{user}{i}", f"u{user}", since_s=float(user)) for user in range(3) for i in range(6)]
    starts = decide(FleetState(zone("a", 6), tasks), 9.0, S).starts
    assert sorted(task[1] for task in starts) == ["0", "0", "1", "1", "2", "2"]


# Stopping others


def test_nobody_is_stopped_before_the_slice_is_over_and_then_the_waiting_user_gets_the_turn():
    tasks = [runs("t1", "u1", "a0"), waits("t2", "u2", since_s=1.0)]
    early = decide(FleetState(zone("a", 1), tasks), 9.0, S)
    assert not early.suspends
    assert early.reservations == (Reservation("t2", ("a0",), 10.0, due=True),)
    assert early.wake_s == 10.0
    state = FleetState(zone("a", 1), tasks, reservations=early.reservations)
    assert list(decide(state, 10.0, S).suspends) == ["t1"]


def crowded(now_s: float, *tasks: Task, **usage: float) -> FleetState:
    """Forty nodes, and a crowd of well served users who wait, so that nobody's turn is due."""
    crowd = [waits(f"w{i}", f"x{i}", since_s=now_s, num_slices=1) for i in range(20)]
    shares = {f"x{i}": had(1e6, now_s) for i in range(20)} | {user: had(much, now_s) for user, much in usage.items()}
    return FleetState(zone("a", 40), [*tasks, *crowd], shares)


def test_a_user_is_stopped_only_for_one_who_stays_clearly_behind():
    mine = [runs(f"t1{i}", "u1", f"a{i}") for i in range(40)]
    waiting = waits("t2", "u2", since_s=100.0, num_slices=1)
    even = (1000 + 10) / 0.95
    assert not decide(crowded(100.0, *mine, waiting, u1=even - 1, u2=1000.0), 100.0, S).suspends
    decision = decide(crowded(100.0, *mine, waiting, u1=even + 1, u2=1000.0), 100.0, S)
    assert list(decision.suspends) == ["t10"]
    assert [(r.task_id, r.due) for r in decision.reservations] == [("t2", False)]
    gang = waits("t2", "u2", 3, since_s=100.0, num_slices=1)
    even = (1000 + 3 * 10) / 0.95
    assert not decide(crowded(100.0, *mine, gang, u1=even - 1, u2=1000.0), 100.0, S).suspends
    assert len(decide(crowded(100.0, *mine, gang, u1=even + 1, u2=1000.0), 100.0, S).suspends) == 3


def test_a_later_slice_passes_by_the_most_served_who_has_not_had_a_full_one():
    young = [runs(f"t1{i}", "u1", f"a{i}", since_s=60.0) for i in range(39)]
    old, waiting = runs("t3", "u3", "a39", since_s=40.0), waits("t2", "u2", since_s=90.0, num_slices=1)
    assert list(decide(crowded(90.0, *young, old, waiting, u1=9e5, u3=5e5), 90.0, S).suspends) == ["t3"]


def test_what_was_freed_for_a_task_stays_its_own_although_a_less_served_user_comes():
    stopping = Task("t1", "u1", 1, 15.0, "stopping", ("a0",), num_slices=1)
    busy = [runs(f"r{i}", "u4", f"a{i}", since_s=14.0) for i in range(1, 40)]
    tasks = [stopping, *busy, waits("t2", "u2", since_s=15.0), waits("t3", "u3", since_s=15.0)]
    state = crowded(16.0, *tasks, u2=500.0, u3=0.0)
    assert [r.task_id for r in decide(state, 16.0, S).reservations] == ["t3"]
    state.reservations = {"t2": Reservation("t2", ("a0",), 15.0, due=False)}
    assert [r.task_id for r in decide(state, 16.0, S).reservations] == ["t2"]


def test_behind_a_due_gang_that_has_to_wait_nobody_reserves_what_it_needs():
    """Else small tasks that come would start one after another, and never all of its nodes would be free at once."""
    first = Reservation("t1", ("a0",), 10.0, due=True)
    tasks = [runs("x", "u9", "a0"), runs("y", "u9", "a1", since_s=2.0), waits("t1", "u1", since_s=0.5)]
    tasks += [waits("gang", "u2", 2, since_s=1.0), waits("t3", "u3", since_s=1.5)]
    assert decide(FleetState(zone("a", 2), tasks, reservations=[first]), 5.0, S).reservations == (first,)
    ripe = [runs(f"r{i}", "u8", f"a{i}", since_s=-99.0) for i in range(1, 40)]
    gang, new = waits("gang", "u2", 40, since_s=-999.0), waits("t3", "u3", since_s=5.0)
    state = crowded(5.0, runs("x", "u9", "a0"), *ripe, waits("t1", "u1", since_s=-1000.0), new, u8=9e5)
    state.reservations = {"t1": first}
    assert [r.task_id for r in decide(state, 5.0, S).reservations] == ["t1", "t3"]
    state.put(gang)
    assert [r.task_id for r in decide(state, 5.0, S).reservations] == ["t1"]


def test_the_next_decision_comes_when_a_slice_ends_a_turn_is_due_or_nodes_are_ready():
    state = FleetState(zone("a", 2), [runs("t1", "u1", "a0"), waits("t2", "u2", 2, since_s=1.0)])
    slow = Settings(min_slice_s=10.0, stop_s=3.0, tick_s=1000.0)
    assert decide(state, 4.0, slow).wake_s == 10.0, "reserved, ready then"
    crowd = [waits(f"w{i}", f"x{i}", since_s=4.0) for i in range(5)]
    busy = [runs("t1", "u1", " ".join(f"a{i}" for i in range(9)), since_s=2.0)]
    state = FleetState(zone("a", 9), [*busy, *crowd])
    assert decide(state, 5.0, slow).wake_s == 12.0, "a slice ends"
    later = [waits(f"w{i}", f"x{i}", since_s=4.0, num_slices=1) for i in range(5)]
    usage = {f"x{i}": had(1e6, 5.0, 4.0) for i in range(5)}
    state = FleetState(zone("a", 9), [runs("t1", "u1", " ".join(busy[0].nodes), -99.0), *later], usage)
    quiet = Settings(min_slice_s=10.0, stop_s=3.0, tick_s=1000.0)
    assert decide(state, 5.0, quiet).wake_s == 4.0 + 5 * 13 - 2 * 13, "the first turn is due"
    assert decide(FleetState(zone("a", 1), [runs("t1", "u1", "a0")]), 4.0, slow).wake_s is None


def test_a_large_task_stops_for_a_small_one_only_if_its_user_stays_ahead_without_it():
    gang, waiting = (
        runs("t1", "u1", " ".join(f"a{i}" for i in range(40))),
        waits("t2", "u2", since_s=100.0, num_slices=1),
    )
    even = (1000 + 40 * 10) / 0.95
    assert not decide(crowded(100.0, gang, waiting, u1=even - 1, u2=1000.0), 100.0, S).suspends
    assert decide(crowded(100.0, gang, waiting, u1=even + 1, u2=1000.0), 100.0, S).suspends


def test_a_first_slice_waits_for_the_least_slice_and_a_later_one_for_a_full_one():
    def stopped(num_slices: int, ran_s: float, user: str = "u1") -> bool:
        mine = [runs(f"t1{i}", "u1", f"a{i}") for i in range(40)]
        state = crowded(ran_s, *mine, waits("t2", user, since_s=ran_s, num_slices=num_slices), u1=2000.0, u2=0.0)
        return bool(decide(state, ran_s, S).suspends)

    for user in ("u1", "u2"):  # the user's own tasks, and those of a more served one
        assert not stopped(0, 9.0, user)
        assert stopped(0, 10.0, user)
        assert not stopped(1, 49.0, user)
        assert stopped(1, 50.0, user)


def test_a_first_slice_inside_an_even_share_stops_those_who_hold_more_whatever_they_had():
    """Two users on 40 nodes, and the crowd of 20: an even share is 40/22 nodes."""
    mine = [runs(f"t1{i}", "u1", f"a{i}") for i in range(39)]
    theirs = runs("t3", "u2", "a39", since_s=11.0)
    for num_slices, num_nodes, holds, right in [
        (0, 1, False, True),
        (1, 1, False, False),
        (0, 2, False, False),
        (0, 1, True, False),
    ]:
        waiting = waits("t2", "u2", num_nodes, since_s=20.0, num_slices=num_slices)
        tasks = [*mine, theirs, waiting] if holds else [*mine, waiting, runs("t4", "u4", "a39")]
        decision = decide(crowded(20.0, *tasks, u1=0.0, u2=1e5, u4=0.0), 20.0, S)
        assert [r.task_id for r in decision.reservations] == ["t2"] * right
        assert list(decision.suspends) == ["t10"] * right


def test_no_more_nodes_are_freed_than_needed():
    tasks = [runs("t1", "u1", "a0 a1 a2"), runs("t2", "u2", "a3"), waits("t3", "u3", since_s=20.0)]
    assert list(decide(FleetState(zone("a", 4), tasks), 21.0, S).suspends) == ["t2"]


def test_a_turn_of_a_user_with_weight_lasts_longer():
    heavy = Settings(min_slice_s=10.0, stop_s=3.0, weights={"u1": 3.0})
    state = FleetState(zone("a", 1), [runs("t1", "u1", "a0"), waits("t2", "u2", since_s=1.0)])
    assert decide(state, 15.0, heavy).reservations[0].ready_s == 30.0


@pytest.mark.parametrize("seed", range(300))
def test_claims_against_every_possible_choice_of_victims(seed):
    """When a gang's nodes can be free at the earliest: the minimum over all sets of tasks that could be stopped."""
    rng = Random(seed)
    nodes = zone("a", rng.randint(1, 6)) + zone("b", rng.choice([0, rng.randint(1, 4)]))
    free, tasks = [node.name for node in nodes], []
    while free and rng.random() < 0.85:
        names = [free.pop(rng.randrange(len(free))) for _ in range(rng.randint(1, len(free)))]
        if len({name[0] for name in names}) > 1 and any(len({n[0] for n in t.nodes}) > 1 for t in tasks):
            continue
        tasks.append(runs(f"t{len(tasks)}", f"u{rng.randrange(3)}", " ".join(names), float(rng.randint(0, 15))))
    task = waits("gang", "g", rng.randint(1, len(nodes)))
    state = FleetState(nodes, tasks)
    offers = [(t.since_s + 10.0, t) for t in tasks if rng.random() < 0.8]
    claim = Board(state, 12.0).claim(task, offers, may_wait=True)

    def ready_s(victims: tuple[tuple[float, Task], ...], across: bool) -> float | None:
        stopped = {t.id for _, t in victims}
        names = {n for names in state.free.values() for n in names} | {n for _, t in victims for n in t.nodes}
        if across:
            fits = len(names) >= task.num_nodes and not any(
                len({n[0] for n in t.nodes}) > 1 and t.id not in stopped for t in tasks
            )
        else:
            fits = any(sum(name[0] == z for name in names) >= task.num_nodes for z in "ab")
        return max([12.0, *(until_s for until_s, _ in victims)]) if fits else None

    every = [some for size in range(len(offers) + 1) for some in combinations(offers, size)]
    local = [time for some in every if (time := ready_s(some, across=False)) is not None]
    anywhere = [time for some in every if (time := ready_s(some, across=True)) is not None]
    best = min(local or anywhere, default=None)
    assert (claim.ready_s if claim else None) == best
    if claim:
        chosen = tuple((t.since_s + 10.0, t) for t in claim.victims)
        assert ready_s(chosen, across=len(claim.zones) > 1) == best
        for left_out in range(len(chosen)):
            fewer = chosen[:left_out] + chosen[left_out + 1 :]
            assert ready_s(fewer, across=len(claim.zones) > 1) is None, "one is stopped for nothing"


# Gangs and zones


def test_a_gang_starts_whole_or_not_at_all():
    state = FleetState(zone("a", 3), [runs("t1", "u1", "a0"), waits("t2", "u2", 3, since_s=1.0)])
    decision = decide(state, 2.0, S)
    assert not decision.starts
    assert decision.reservations == (Reservation("t2", ("a0", "a1", "a2"), 10.0, due=True),)


def test_a_gang_starts_in_the_zone_that_it_fills_best():
    state = FleetState(zone("a", 4) + zone("b", 3), [waits("t1", "u1", 3)])
    assert decide(state, 0.0, S).starts["t1"].nodes == ("b0", "b1", "b2")


def test_at_most_one_task_is_across_zones():
    tasks = [waits("t1", "u1", 3), waits("t2", "u2", 3, since_s=1.0)]
    decision = decide(FleetState(zone("a", 2) + zone("b", 2) + zone("c", 2), tasks), 1.0, S)
    assert list(decision.starts) == ["t1"]
    assert decision.starts["t1"].nodes == ("a0", "a1", "b0")
    assert [r.task_id for r in decision.reservations] == ["t2"], "its turn: t1 stops for it when its slice is over"
    assert decision.reservations[0].ready_s == 11.0


def test_the_task_across_zones_stops_even_for_one_that_needs_none_of_its_nodes():
    nodes = zone("a", 2) + zone("b", 2) + zone("c", 2) + zone("d", 1)
    across, second = runs("t1", "u1", "a0 a1 b0"), waits("t2", "u2", 3, since_s=1.0)
    first = decide(FleetState(nodes, [across, second]), 5.0, S)
    later = decide(FleetState(nodes, [across, second], reservations=first.reservations), 10.0, S)
    assert list(later.suspends) == ["t1"]


def test_nodes_reserved_for_a_gang_are_backfilled_with_what_ends_in_time():
    gang = Reservation("t2", ("a0", "a1"), 10.0, due=True)
    tasks = [runs("t1", "u1", "a0"), waits("t2", "u2", 2, since_s=0.0)]
    short, long = waits("t3", "u3", since_s=1.0, limit_s=7.0), waits("t4", "u4", since_s=1.0, limit_s=8.0)
    state = FleetState(zone("a", 2), [*tasks, short, long], reservations=[gang])
    assert list(decide(state, 3.0, S).starts) == ["t3"]
    state = FleetState(zone("a", 2), [*tasks, waits("t5", "u5", since_s=1.0)], reservations=[gang])
    assert not decide(state, 3.0, S).starts
    state = FleetState(zone("a", 2), [*tasks, long], reservations=[gang])
    assert not decide(state, 3.0, S).starts


def test_a_whole_cluster_gang_gets_its_turn_within_one_slice_although_small_tasks_keep_coming():
    tasks = [runs(f"t{i}", f"u{i}", f"a{i}", since_s=float(i)) for i in range(4)]
    tasks += [waits("big", "v", 4, since_s=0.0), *(waits(f"s{i}", f"u{i}", since_s=4.0) for i in range(4))]
    state = FleetState(zone("a", 4), tasks, {f"u{i}": had(0, 4.0, float(i)) for i in range(4)})
    decision = decide(state, 60.0, S)
    assert [r.task_id for r in decision.reservations if r.due][:1] == ["big"]
    assert sorted(decision.suspends) == ["t0", "t1", "t2", "t3"]


# Nodes that fail, drain, come back


@pytest.mark.parametrize("spare", [True, False])
def test_when_a_node_dies_under_a_gang_only_that_node_is_replaced(spare):
    nodes = [Node(n.name, n.zone, "lost" if n.name == "a1" else "up") for n in zone("a", 4) + zone("b", 3)]
    gang = waits("t1", "u1", 3, since_s=20.0, kept_nodes=("a0", "a2"), num_slices=1)
    state = FleetState(nodes, [gang, *([] if spare else [runs("t2", "u2", "a3")])])
    decision = decide(state, 20.0, S)
    if spare:
        assert decision.starts["t1"].nodes == ("a0", "a2", "a3")
    else:
        assert decision.reservations == (Reservation("t1", ("a0", "a2", "a3"), 20.0, due=True),)
        assert list(decision.suspends) == ["t2"], "another zone is free, but the gang stays"


def test_a_gang_moves_when_its_zone_has_no_other_node():
    nodes = [Node(n.name, n.zone, "lost" if n.name == "a1" else "up") for n in zone("a", 3) + zone("b", 3)]
    gang = waits("t1", "u1", 3, since_s=20.0, kept_nodes=("a0", "a2"), num_slices=1)
    assert decide(FleetState(nodes, [gang]), 20.0, S).starts["t1"].nodes == ("b0", "b1", "b2")


def test_a_drained_node_takes_nothing_and_what_runs_there_moves_off_after_its_slice():
    nodes = [Node("a0", "a", "drained"), Node("a1", "a"), Node("a2", "a")]
    gang = runs("t1", "u1", "a0 a1")
    assert not decide(FleetState(nodes, [gang]), 9.0, S).suspends
    assert decide(FleetState(nodes, [gang]), 9.0, S).wake_s == 10.0
    suspend = decide(FleetState(nodes, [gang]), 10.0, S).suspends["t1"]
    assert suspend.kept_nodes == ("a1",)
    assert "a0" in suspend.reason
    after = waits("t1", "u1", 2, since_s=11.0, kept_nodes=suspend.kept_nodes, num_slices=1)
    assert decide(FleetState(nodes, [after]), 11.0, S).starts["t1"].nodes == ("a1", "a2")


def test_lost_contact_is_not_death():
    state = FleetState([Node("a0", "a", "lost"), Node("a1", "a")], [runs("t1", "u1", "a0"), waits("t2", "u2", 2)])
    decision = decide(state, 50.0, S)
    assert not decision.suspends
    assert not decision.starts


# What comes in wrong


def test_a_task_larger_than_the_fleet_is_refused_with_the_largest_possible_or_waits_for_nodes():
    state = FleetState(zone("a", 3))
    check_size(3, state, wait_for_nodes=False)
    with pytest.raises(UserError, match="nodes = 4: the fleet has 3; ask for 3 or fewer"):
        check_size(4, state, wait_for_nodes=False)
    check_size(4, state, wait_for_nodes=True)
    with pytest.raises(UserError, match="at least"):
        check_size(0, state, wait_for_nodes=True)
    tasks = [waits("t1", "u1", 4), waits("t2", "u2", 1, since_s=5.0)]
    assert list(decide(FleetState(zone("a", 3), tasks), 6.0, S).starts) == ["t2"]
    assert list(decide(FleetState(zone("a", 4), tasks[:1]), 6.0, S).starts) == ["t1"]


def test_a_clock_that_went_back_stops_nobody_and_charges_nothing():
    state = FleetState(zone("a", 1), [runs("t1", "u1", "a0", since_s=1000.0), waits("t2", "u2", since_s=1001.0)])
    decision = decide(state, 5.0, S)
    assert not decision.suspends
    assert decision.wake_s is not None
    assert decayed(Usage(7.0, as_of_s=1000.0), 3, 5.0, 100.0) == 7.0


@pytest.mark.parametrize(
    ("setting", "value"),
    [("min_slice_s", 0.0), ("half_life_s", -1.0), ("tolerance", 1.0), ("tick_s", float("nan")), ("stop_s", -1.0)],
)
def test_settings_name_what_is_wrong(setting, value):
    with pytest.raises(UserError, match=f"{setting} = {value!r}"):
        Settings(**{setting: value})


def test_weights_are_above_zero():
    with pytest.raises(UserError, match=r"weights\.ann = 0"):
        Settings(weights={"ann": 0})


# Usage and turns


def test_usage_fades_with_its_half_life_and_grows_with_what_is_held():
    assert decayed(Usage(800.0, as_of_s=100.0), 0, 150.0, half_life_s=50.0) == pytest.approx(400.0)
    steps, total = 200_000, 0.0
    for i in range(steps):  # three nodes for 80 s, summed step by step
        total += 3 * (80.0 / steps) * 0.5 ** ((80.0 - 80.0 * (i + 0.5) / steps) / 50.0)
    assert decayed(Usage(as_of_s=0.0), 3, 80.0, half_life_s=50.0) == pytest.approx(total, rel=1e-6)


def test_turns_on_one_node_are_strict_and_on_many_they_leave_time():
    tasks = [waits(f"t{i}", f"u{i}", since_s=float(i)) for i in range(4)]
    one = turns(FleetState(zone("a", 1), tasks), 4.0, S, dict.fromkeys(("u0", "u1", "u2", "u3"), 0.0))
    assert [turn.user for turn in one] == ["u0", "u1", "u2", "u3"]
    assert [turn.due_s for turn in one] == [0 + 52 - 26, 1 + 52 - 39, 2 + 52 - 52, 3 + 52 - 65]
    many = turns(FleetState(zone("a", 4), tasks), 4.0, S, dict.fromkeys(("u0", "u1", "u2", "u3"), 0.0))
    assert [turn.due_s for turn in many] == [26.0, 27.0, 28.0, 29.0]
