"""How much of the cluster each user had: node-seconds that fade with a half-life.

In: the node-seconds of the past and the nodes held now. Out: one `Usage` per user, exact at any later time while the
number of held nodes stays the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """What a user had up to `as_of_s`.

    node_seconds: decayed to `as_of_s`.
    last_turn_s: when one of the user's tasks last took the user's turn (Start.turn); -inf for never.
    """

    node_seconds: float = 0.0
    as_of_s: float = 0.0
    last_turn_s: float = -math.inf


def decayed(usage: Usage, num_nodes: int, now_s: float, half_life_s: float) -> float:
    """Node-seconds at `now_s` of a user who has held `num_nodes` since `usage.as_of_s`. A clock that went back: as of
    then."""
    elapsed_s = max(0.0, now_s - usage.as_of_s)
    kept = 0.5 ** (elapsed_s / half_life_s)
    return usage.node_seconds * kept + num_nodes * (1.0 - kept) * half_life_s / math.log(2.0)
