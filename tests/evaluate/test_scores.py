"""Estimators against every subset counted by hand, and intervals against published values."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from fireflyer.evaluate.scores import majority_at_k, pass_at_k, score, wilson


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples):
    for correct in range(samples + 1):
        right = [index < correct for index in range(samples)]
        for k in range(1, samples + 1):
            subsets = list(combinations(right, k))
            assert pass_at_k(correct, samples, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_worked_by_hand():
    """4 samples, 2 right, k = 2: of the 6 pairs only one holds none."""
    assert pass_at_k(2, 4, 2) == pytest.approx(5 / 6)


def test_majority():
    answers, right = ["7", "7", "8", "8", "9", "7"], [True, True, False, False, False, True]
    assert majority_at_k(answers, right, 6) == 1.0
    assert majority_at_k(answers, right, 4) == 0.5  # 7 and 8 lead together
    assert majority_at_k(answers, right, 2) == pytest.approx((1 + 0 + 0.5) / 3)
    assert majority_at_k(["", "", "7"], [False, False, True], 3) == 1.0  # what can't be read doesn't vote
    assert majority_at_k(["", ""], [False, False], 2) == 0.0


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # statsmodels' proportion_confint(method="wilson"), and Newcombe 1998's table for 81 of 263, 15 of 148, 0 of 20
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_which_interval():
    assert score([1.0, 0.0, 1.0]).method == "wilson"
    clustered = score([0.25, 0.75, 1.0, 0.0] * 25)
    assert clustered.method == "bootstrap over problems"
    assert clustered.value == 0.5
    # The normal approximation over problems, 1.96 s / sqrt(n), which the bootstrap must be near.
    half = 1.96 * np.std([0.25, 0.75, 1.0, 0.0]) / 10
    assert (clustered.low, clustered.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.015)
    assert score([0.5]).low is None


def test_weights_are_bytes():
    """Bits per byte over documents: all bits over all bytes."""
    assert score([2.0, 8.0], [300.0, 100.0]).value == pytest.approx((600 + 800) / 400)
