"""States that no history leads to, with clocks that jump: whatever the policy is shown, what it says can be done."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.fleet.decision import Settings
from fireflyer.fleet.fair_share import Usage
from fireflyer.fleet.policy import decide
from fireflyer.fleet.state import FleetState, Node, Reservation, Task

S = Settings(min_slice_s=10.0, stop_s=3.0, half_life_s=100.0, weights={"u0": 2.0})
TIMES = st.floats(-1e6, 1e6) | st.integers(-30, 30).map(float)


@st.composite
def states(draw) -> FleetState:
    zones = draw(st.integers(1, 3))
    health = st.sampled_from(["up", "up", "up", "drained", "lost"])
    nodes = [Node(f"n{i}", f"z{draw(st.integers(0, zones - 1))}", draw(health)) for i in range(draw(st.integers(1, 8)))]
    free = [node.name for node in nodes]
    tasks = []
    for i in range(draw(st.integers(0, 7))):
        phase = draw(st.sampled_from(["waiting", "running", "stopping"]))
        held = tuple(free[: draw(st.integers(1, 3))]) if phase != "waiting" else ()
        if phase != "waiting" and not held:
            continue
        free = free[len(held) :]
        kept = tuple(draw(st.sets(st.sampled_from(nodes), max_size=2))) if phase == "waiting" else ()
        tasks.append(
            Task(
                f"t{i}",
                f"u{draw(st.integers(0, 3))}",
                len(held) or draw(st.integers(1, 10)),
                draw(TIMES),
                phase,
                held,
                tuple(node.name for node in kept),
                draw(st.integers(0, 2)),
                draw(st.just(float("inf")) | st.floats(0.1, 50.0)),
            )
        )
    usage = {f"u{i}": Usage(draw(st.floats(0, 1e6)), draw(TIMES), draw(TIMES)) for i in range(draw(st.integers(0, 4)))}
    reservations = []
    if draw(st.booleans()):
        for task in tasks[:2]:
            names = tuple(node.name for node in draw(st.permutations(nodes))[: task.num_nodes])
            if len(names) == task.num_nodes:
                reservations.append(Reservation(task.id, names, draw(TIMES), draw(st.booleans())))
    return FleetState(nodes, tasks, usage, reservations)


@given(states(), TIMES)
@settings(max_examples=400, deadline=None)
def test_every_decision_can_be_carried_out(state: FleetState, now_s: float) -> None:
    decision = decide(state, now_s, S)
    given_out: list[str] = []
    for task_id, start in decision.starts.items():
        assert state.tasks[task_id].phase == "waiting"
        assert len(set(start.nodes)) == state.tasks[task_id].num_nodes
        given_out += start.nodes
    assert len(given_out) == len(set(given_out))
    assert all(name not in state.holder and state.nodes[name].health == "up" for name in given_out)
    for task_id in decision.suspends:
        task = state.running[task_id]
        assert now_s - task.since_s >= min(S.slice_s(task.user), task.limit_s) - 1e-9 * abs(now_s)
    reserved = [name for reservation in decision.reservations for name in reservation.nodes]
    assert len(reserved) == len(set(reserved))
    assert all(state.nodes[name].health == "up" for name in reserved)
    assert not {reservation.task_id for reservation in decision.reservations} & decision.starts.keys()
    assert decision.wake_s is None or decision.wake_s > now_s
    assert decision == decide(state, now_s, S), "deciding leaves the state as it was"
