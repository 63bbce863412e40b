"""Folds against dates worked out by hand; and every label known before its test begins."""

from __future__ import annotations

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.folds import Fold, walk_forward


def weekdays(first: str, last: str) -> np.ndarray:
    days = np.arange(np.datetime64(first), np.datetime64(last) + 1)
    return days[np.is_busday(days)]


DATES = weekdays("2020-01-02", "2023-12-29")


def spans(folds: list[Fold]) -> list[tuple[str, str]]:
    return [(str(DATES[fold.test.start]), str(DATES[fold.test.stop - 1])) for fold in folds]


def test_tests_are_half_years_in_a_row() -> None:
    folds = walk_forward(DATES, train_months=24, test_months=6, purge=21, embargo=5, test_from="2022-01-01")
    assert spans(folds) == [
        ("2022-01-03", "2022-06-30"),
        ("2022-07-01", "2022-12-30"),
        ("2023-01-02", "2023-06-30"),
        ("2023-07-03", "2023-12-29"),
    ]
    assert [str(DATES[fold.train.start]) for fold in folds] == ["2020-01-02", "2020-07-01", "2021-01-01", "2021-07-01"]
    for fold in folds:
        assert fold.test.start - fold.train.stop == 26
        assert fold.known_until == fold.train.stop + 21


def test_labels_end_before_the_test_and_its_embargo() -> None:
    lag, horizon, embargo = 1, 20, 5
    for fold in walk_forward(DATES, train_months=12, test_months=3, purge=lag + horizon, embargo=embargo):
        last_label_ends = fold.train.stop - 1 + lag + horizon
        assert last_label_ends < fold.known_until
        assert last_label_ends + embargo < fold.test.start


def test_expanding_folds_begin_at_the_beginning() -> None:
    folds = walk_forward(DATES, train_months=12, test_months=6, purge=6, expanding=True, test_from="2021-01-01")
    assert {fold.train.start for fold in folds} == {0}
    assert len({fold.train.stop for fold in folds}) == len(folds)


def test_sessions_after_the_last_test_are_in_no_fold() -> None:
    folds = walk_forward(
        DATES, train_months=12, test_months=6, purge=6, test_from="2021-07-01", test_until="2021-12-31"
    )
    assert spans(folds) == [("2021-07-01", "2021-12-31")]
    assert all(fold.test.stop <= int(np.searchsorted(DATES, np.datetime64("2022-01-01"))) for fold in folds)


def test_the_last_test_may_be_cut_by_the_end_of_the_data() -> None:
    dates = weekdays("2020-01-02", "2021-08-11")
    folds = walk_forward(dates, train_months=12, test_months=6, purge=6, test_from="2021-01-01")
    assert [str(dates[fold.test.stop - 1]) for fold in folds] == ["2021-06-30", "2021-08-11"]


def test_too_few_sessions_are_named() -> None:
    with pytest.raises(UserError, match=r"2020-01-02\.\.2020-03-31: too few for 24 months"):
        walk_forward(weekdays("2020-01-02", "2020-03-31"), train_months=24, test_months=6, purge=21)


def test_a_fold_that_overlaps_its_test_cannot_be_made() -> None:
    with pytest.raises(AssertionError):
        Fold(slice(0, 100), slice(105, 120), purge=6, embargo=0)
