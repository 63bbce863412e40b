"""Walk-forward folds: what a model learns from ends, with room to spare, before what it is tested on begins.

In: session dates and lengths in calendar months. Out: `Fold`s of session indices. A label made at t is known at the
close of t + lag + horizon; sessions whose labels would reach into the test are purged, and an embargo lies between.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError

Dates = NDArray[np.datetime64]


@dataclass(frozen=True)
class Fold:
    """train, test: sessions whose labels are learned from, and those that are scored.

    purge: sessions after `train` that its labels reach over, lag and longest horizon; embargo: more of them, unused.
    """

    train: slice
    test: slice
    purge: int
    embargo: int

    @property
    def known_until(self) -> int:
        """The first session that training must not see: the labels of `train` end before it."""
        return self.train.stop + self.purge

    def __post_init__(self) -> None:
        assert 0 <= self.train.start < self.train.stop
        assert self.known_until + self.embargo <= self.test.start < self.test.stop


def walk_forward(
    dates: Dates,
    *,
    train_months: int,
    test_months: int,
    purge: int,
    embargo: int = 0,
    expanding: bool = False,
    test_from: str | None = None,
    test_until: str | None = None,
) -> list[Fold]:
    """Folds whose tests follow one another by whole calendar months; the last may be cut by the end of the data.

    Args:
        dates: (D,) ascending sessions.
        train_months: length of each training span, purge and embargo taken off its end; the first one's if `expanding`.
        test_from, test_until: ISO dates between which tests lie, the first a month's beginning; default as early and as
            late as there is data. Sessions after `test_until` are in no fold.

    Raises UserError where the dates hold no fold.
    """
    import pandas as pd
    from skfolio.model_selection import WalkForward

    stop = len(dates) if test_until is None else int(np.searchsorted(dates, np.datetime64(test_until), side="right"))
    first = 0
    if test_from is not None:
        begin = np.datetime64(test_from, "M") - train_months
        first = int(np.searchsorted(dates, begin.astype("datetime64[D]")))
    days = dates[first:stop].copy()
    # The splitter's first month begins on its first day, the data's on its first session.
    days[:1] = days[:1].astype("datetime64[M]")
    frame = pd.DataFrame(index=pd.DatetimeIndex(days), data={"session": 0.0})
    splitter = WalkForward(
        test_size=test_months,
        train_size=train_months,
        freq="MS",
        expand_train=expanding,
        reduce_test=True,
        purged_size=purge + embargo,
    )
    folds = [_fold(train + first, test + first, purge, embargo) for train, test in splitter.split(frame) if len(train)]
    if not folds:
        span = f"{dates[0]}..{dates[stop - 1]}" if stop else "none"
        raise UserError(
            f"sessions {span}: too few for {train_months} months of training and a test after them; give more data, or"
            " a smaller market.train_months"
        )
    return folds


def _fold(train: NDArray[np.integer], test: NDArray[np.integer], purge: int, embargo: int) -> Fold:
    return Fold(slice(int(train[0]), int(train[-1]) + 1), slice(int(test[0]), int(test[-1]) + 1), purge, embargo)
