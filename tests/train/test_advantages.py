"""Group advantages and token weights against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.train.advantages import equal_groups, group_advantages, token_weights
from fireflyer.train.post_training_settings import LengthRule

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
    assert equal_groups(rewards, torch.ones_like(rewards, dtype=torch.bool)).all()


def test_an_answer_without_a_reward_belongs_to_no_group():
    nan = float("nan")
    rewards = torch.tensor([[1.0, nan, 0.0, 0.0], [nan, 2.0, nan, nan], [nan, 3.0, 3.0, nan], [nan] * 4])
    graded = ~rewards.isnan()
    expected = torch.tensor([[2 / 3, 0, -1 / 3, -1 / 3], [0] * 4, [0] * 4, [0] * 4]).double()
    torch.testing.assert_close(group_advantages(rewards, graded, by_std=False), expected)
    assert group_advantages(rewards, graded)[0, :1].item() == pytest.approx(2 / 3 / (2 / 9) ** 0.5, abs=1e-5)
    assert (group_advantages(rewards, graded)[1:] == 0).all()
    assert equal_groups(rewards, graded).tolist() == [False, True, True, True]


def test_token_weights_by_hand():
    lengths = torch.tensor([1, 4, 0, 5])
    assert token_weights(lengths, "answer", 10).tolist() == [1 / 4, 1 / 16, 0, 1 / 20]
    assert token_weights(lengths, "token", 10).tolist() == [1 / 10, 1 / 10, 0, 1 / 10]
    assert token_weights(lengths, "constant", 10).tolist() == [1 / 40, 1 / 40, 0, 1 / 40]


@pytest.mark.parametrize("rule", ["answer", "token", "constant"])
def test_with_nothing_left_no_weight_is_nan(rule: LengthRule):
    assert (token_weights(torch.tensor([0, 0]), rule, 10) == 0).all()
