"""The number of threads of a step, against a machine whose step times are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fireflyer.infer.pace import TRY_EVERY, Pace


def run(pace: Pace, seconds: Callable[[int], float], steps: int, rows: int = 1, most: int = 2) -> list[int]:
    """Steps on a machine where one of `n` threads takes `seconds(n)`; the numbers of threads taken."""
    taken = []
    for _ in range(steps):
        threads = pace.threads(rows, most)
        pace.took(rows, threads, seconds(threads) * rows)
        taken.append(threads)
    return taken


def quiet(threads: int) -> float:
    return 1.0 + 1.0 / threads


def busy(threads: int) -> float:
    return 2.0 if threads == 1 else 4.0


def test_every_number_is_tried_and_the_fastest_stays() -> None:
    taken = run(Pace(), quiet, 10 * TRY_EVERY, most=6)
    assert set(taken) == {1, 2, 4, 6}
    assert taken.count(6) > 0.95 * len(taken)


def test_another_process_comes_and_goes() -> None:
    pace = Pace()
    assert run(pace, quiet, 2 * TRY_EVERY)[-1] == 2
    came = run(pace, busy, 2 * TRY_EVERY)
    assert set(came[TRY_EVERY // 2 : TRY_EVERY]) == {1}
    gone = run(pace, quiet, 3 * TRY_EVERY)
    assert set(gone[TRY_EVERY + 5 : 2 * TRY_EVERY - 5]) == {2}


def test_one_slow_try_is_forgotten_at_the_next() -> None:
    pace = Pace()
    run(pace, lambda threads: 100.0 if threads == 2 else 2.0, 2)
    assert run(pace, quiet, 2 * TRY_EVERY)[TRY_EVERY + 1 : -5] == [2] * (TRY_EVERY - 6)


def test_sizes_are_kept_apart() -> None:
    pace = Pace()
    for _ in range(3 * TRY_EVERY - 10):
        run(pace, busy, 1, rows=1)
        run(pace, quiet, 1, rows=16)
    assert pace.threads(1, 2) == 1
    assert pace.threads(16, 2) == 2
    assert pace.threads(31, 2) == 2


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 64])
def test_never_more_than_there_are(most: int) -> None:
    taken = run(Pace(), quiet, 3 * TRY_EVERY, most=most)
    assert max(taken) == most
    assert min(taken) >= 1
