"""Group advantages and token weights against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.train.advantages import LengthRule, equal_groups, group_advantages, token_weights

REWARDS = st.lists(st.lists(st.floats(-10, 10, allow_nan=False), min_size=4, max_size=4), min_size=1, max_size=5)


def test_a_group_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]])
    assert group_advantages(rewards, by_std=False).tolist() == [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]
    # The deviations are 0.5 and sqrt((2.25 + 3 * 0.25) / 4).
    by_std = group_advantages(rewards)
    torch.testing.assert_close(by_std[0], torch.tensor([1.0, -1.0, -1.0, 1.0]).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(by_std[1], torch.tensor([1.5, -0.5, -0.5, -0.5]).double() / 0.75**0.5, atol=1e-5, rtol=0)


@given(rewards=REWARDS, by_std=st.booleans())
def test_advantages_of_a_group_sum_to_zero(rewards: list[list[float]], by_std: bool):
    advantages = group_advantages(torch.tensor(rewards), by_std=by_std)
    assert advantages.isfinite().all()
    assert advantages.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("size", [2, 3, 8, 16, 100])
def test_all_equal_groups_give_exactly_zero(size: int, by_std: bool):
    rewards = torch.tensor([0.1, 1.1, 1 / 3, 0.0, -2.7])[:, None].expand(-1, size)
    assert (group_advantages(rewards, by_std=by_std) == 0).all()
    assert equal_groups(rewards).all()
    assert equal_groups(torch.tensor([[1.0, 1.0], [1.0, 0.5]])).tolist() == [True, False]


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 4, 0, 5])
    assert token_weights(lengths, "answer", 10).tolist() == [1 / 4, 1 / 16, 0, 1 / 20]
    assert token_weights(lengths, "token", 10).tolist() == [1 / 10, 1 / 10, 0, 1 / 10]
    assert token_weights(lengths, "constant", 10).tolist() == [1 / 40, 1 / 40, 0, 1 / 40]


@pytest.mark.parametrize("rule", ["answer", "token", "constant"])
def test_with_nothing_left_no_weight_is_nan(rule: LengthRule):
    assert (token_weights(torch.tensor([0, 0]), rule, 10) == 0).all()
