"""Why a task waits and by when its slice is promised, in the cases that there are."""

from __future__ import annotations

from fireflyer.fleet.decision import Settings
from fireflyer.fleet.explain import waits
from fireflyer.fleet.policy import decide
from fireflyer.fleet.state import FleetState, Node, Task

S = Settings(min_slice_s=10.0, stop_s=3.0)


def runs(task_id: str, nodes: str) -> Task:
    names = tuple(nodes.split())
    return Task(task_id, "r", len(names), 0.0, "running", names, num_slices=1)


def test_users_and_own_tasks_before_and_the_promise():
    tasks = [runs("r1", "a0"), Task("t1", "u", 1, 1.0), Task("t2", "u", 1, 2.0), Task("t3", "v", 1, 3.0)]
    found = waits(FleetState([Node("a0")], tasks), 5.0, S)
    assert found["t1"].reason == "next in turn; asks for 1 node, 0 are free together"
    assert found["t2"].reason == "1 of u's own tasks before, next in turn; asks for 1 node, 0 are free together"
    assert found["t3"].reason == "1 user before; asks for 1 node, 0 are free together"
    assert [found[task].by_s for task in ("t1", "t2", "t3")] == [1 + 26.0, 2 + 52.0, 3 + 26.0]


def test_nodes_that_are_being_freed():
    state = FleetState([Node("a0"), Node("a1")], [runs("r1", "a0"), Task("t1", "u", 2, 1.0)])
    state.reservations = {r.task_id: r for r in decide(state, 4.0, S).reservations}
    wait = waits(state, 4.0, S)["t1"]
    assert wait.reason == "its nodes are being freed: 1 of 2 are, the others have their slices for 6 s more"
    assert "the others are saving" in waits(state, 10.0, S)["t1"].reason


def test_a_task_across_zones_waits_for_the_other_one_and_too_large_ones_for_nodes():
    nodes = [Node("a0", "a"), Node("b0", "b"), Node("b1", "b")]
    found = waits(FleetState(nodes, [runs("r1", "a0 b0"), Task("t1", "u", 3, 1.0), Task("t2", "u", 4, 1.0)]), 2.0, S)
    assert found["t1"].reason == "next in turn; asks for more nodes than a zone has, and r1 is across zones"
    assert found["t2"].reason == "asks for 4 nodes; 3 of 3 are up"
    assert found["t2"].by_s is None
