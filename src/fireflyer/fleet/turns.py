"""Whose turn it is, and when turns begin to go before everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fireflyer.fleet.decision import Settings
from fireflyer.fleet.fair_share import Usage, decayed
from fireflyer.fleet.state import FleetState, Task


@dataclass(frozen=True)
class Turn:
    """A waiting user's next turn: for the task that has waited longest of those that fit the nodes that are up.

    since_s: since when the user has waited for it. due_s: when it begins to go before everything else.
    """

    user: str
    task: Task
    since_s: float
    due_s: float


def served(state: FleetState, now_s: float, settings: Settings) -> dict[str, float]:
    """What each user who waits or holds nodes had up to now: faded node-seconds per weight."""
    found = {}
    for user in sorted({*state.waiting, *state.held}):
        usage = state.usage.get(user, Usage(as_of_s=now_s))
        had = decayed(usage, state.held.get(user, 0), now_s, settings.half_life_s)
        found[user] = had / settings.weight(user)
    return found


def turns(state: FleetState, now_s: float, settings: Settings, had: Mapping[str, float]) -> list[Turn]:
    """Waiting users, the longest waiting first, and of those who have waited equally long the one who `had` less.

    Serving in this order, user k waits for as many rounds as the gangs before need: gangs that together fit the
    smallest zone start together. A turn is due once a slice for somebody else would break the promise of `turn_s`.
    """
    heads = [head for user in state.waiting if (head := _head(state, user))]
    waits = [(min(now_s, max(head.since_s, state.usage.get(head.user, Usage()).last_turn_s)), head) for head in heads]
    waits.sort(key=lambda wait: (wait[0], had[wait[1].user], wait[1].user))
    promise_s, round_s = settings.turn_s(len(waits)), settings.turn_s(1)
    room = min((up for up in state.num_up.values() if up), default=0)
    rounds, filled = 0, room
    found = []
    for since_s, head in waits:
        filled += head.num_nodes
        if filled > room:
            rounds, filled = rounds + 1, head.num_nodes
        found.append(Turn(head.user, head, since_s, since_s + promise_s - (rounds + 1) * round_s))
    return found


def _head(state: FleetState, user: str) -> Task | None:
    heads = [queue[0] for (size, _), queue in state.waiting[user].items() if state.possible(size)]
    return state.tasks[min(heads)[1]] if heads else None
