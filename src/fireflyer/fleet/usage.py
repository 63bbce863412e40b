"""What each user had, from the attempts in the ledger: node-seconds that fade, kept up as attempts end."""

from __future__ import annotations

from collections.abc import Iterable

from fireflyer.fleet.fair_share import Usage, decayed
from fireflyer.fleet.ledger import AttemptRow

FORGOTTEN_HALF_LIVES = 30
"""After so many, a node-second counts a billionth."""


class UsageBook:
    """Ended attempts summed up by user; those that are open are added when asked."""

    def __init__(self, half_life_s: float, ended: Iterable[tuple[str, AttemptRow]]) -> None:
        self._half_life_s = half_life_s
        self._past: dict[str, Usage] = {}
        self._turns: dict[str, float] = {}
        for user, attempt in ended:
            self.add(user, attempt)

    def add(self, user: str, attempt: AttemptRow) -> None:
        """An attempt that has ended, or is open and of which only the turn counts so far."""
        if attempt.outcome != "void" and attempt.turn:
            self._turns[user] = max(self._turns.get(user, float("-inf")), attempt.opened_at)
        if attempt.ended_at is None or attempt.outcome == "void":
            return
        past = self._past.get(user, Usage(as_of_s=attempt.ended_at))
        as_of_s = max(past.as_of_s, attempt.ended_at)
        total = decayed(past, 0, as_of_s, self._half_life_s)
        total += self._of(attempt.opened_at, attempt.ended_at, len(attempt.nodes), as_of_s)
        self._past[user] = Usage(total, as_of_s)

    def at(self, now_s: float, held: Iterable[tuple[str, AttemptRow]]) -> dict[str, Usage]:
        """Every user's usage now; `held`: the open attempts."""
        totals = {user: decayed(past, 0, now_s, self._half_life_s) for user, past in self._past.items()}
        for user, attempt in held:
            self.add(user, attempt)
            so_far = self._of(attempt.opened_at, now_s, len(attempt.nodes), now_s)
            totals[user] = totals.get(user, 0.0) + so_far
        return {user: Usage(total, now_s, self._turns.get(user, float("-inf"))) for user, total in totals.items()}

    def _of(self, begin_s: float, end_s: float, num_nodes: int, now_s: float) -> float:
        held = decayed(Usage(as_of_s=begin_s), num_nodes, end_s, self._half_life_s)
        return decayed(Usage(held, end_s), 0, now_s, self._half_life_s)
