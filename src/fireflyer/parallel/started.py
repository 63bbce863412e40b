"""What a launcher told this process about the others, read from the environment as torchrun sets it. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def world_size() -> int:
    """How many ranks were started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process speaks for all; so does one by itself."""
    return os.environ.get("RANK", "0") == "0"


def together(check: Callable[[], T]) -> T:
    """`check()`; where it raises UserError on any of the ranks that were started, all raise the lowest rank's."""
    if world_size() == 1:
        return check()
    from fireflyer.parallel.ranks import meet, share_error

    meet()
    return share_error(check)
