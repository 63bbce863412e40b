"""How much better an answer was than the others to its problem, and how much each of its tokens counts. Pure.

In: rewards of P problems with G answers each; lengths of the answers. Out: advantages, and weights of tokens that sum
over the whole batch to what the objective divides by, so that no way of splitting a batch changes the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fireflyer.train.post_training_settings import LengthRule

_TINY = 1e-6
"""Beside the standard deviation: only keeps rewards that differ by rounding from being blown up."""


def group_advantages(rewards_PG: Tensor, graded_PG: Tensor | None = None, *, by_std: bool = True) -> Tensor:
    """A = (r - mean) / std over each group (V3 report, eq. 28); without `by_std` r - mean (Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards_PG: (P, G), finite where graded; G at least 2.
        graded_PG: (P, G) bool, which answers have a reward at all: the others belong to no group. Default: all.
        by_std: divide by the group's standard deviation (population, as the report writes it).

    Returns:
        (P, G) fp64, each row with the sum 0; exactly 0 in rows whose rewards are all equal, and for what has no reward.
    """
    graded_PG = torch.ones_like(rewards_PG, dtype=torch.bool) if graded_PG is None else graded_PG
    rewards_PG = rewards_PG.double().masked_fill(~graded_PG, 0.0)
    count_P1 = graded_PG.sum(1, keepdim=True).clamp(min=1)
    centred_PG = (rewards_PG - rewards_PG.sum(1, keepdim=True) / count_P1).masked_fill(~graded_PG, 0.0)
    if by_std:
        centred_PG = centred_PG / ((centred_PG.square().sum(1, keepdim=True) / count_P1).sqrt() + _TINY)
    # A mean of equal numbers is off by rounding, and divided by a deviation of that size it would be a whole advantage.
    return centred_PG.masked_fill(equal_groups(rewards_PG, graded_PG)[:, None], 0.0)


def equal_groups(rewards_PG: Tensor, graded_PG: Tensor) -> Tensor:
    """(P,) whether all rewards of a group are equal, or it has fewer than two: it teaches nothing."""
    low_P = rewards_PG.masked_fill(~graded_PG, float("inf")).amin(1)
    high_P = rewards_PG.masked_fill(~graded_PG, float("-inf")).amax(1)
    return low_P >= high_P


def token_weights(lengths_N: Tensor, rule: LengthRule, max_tokens: int) -> Tensor:
    """What each token of each answer is multiplied by in the sum that makes the loss of a batch: (N,) fp64.

    Args:
        lengths_N: tokens of each answer that count; 0 for an answer that is left out, which then weighs nothing but
            still counts as one of the batch.
        rule: "answer" is the mean over answers of the mean over their tokens, as the report writes GRPO: a token of a
            long answer counts less. "token" is the mean over all tokens (DAPO, arXiv 2503.14476); "constant" the sum
            divided by the number of answers and `max_tokens` (Dr. GRPO). Neither has that bias of length.
    """
    lengths_N = lengths_N.double()
    num_answers = lengths_N.numel()
    if rule == "answer":
        return torch.where(lengths_N > 0, 1 / (lengths_N.clamp(min=1) * num_answers), 0.0)
    total = lengths_N.sum() if rule == "token" else torch.full_like(lengths_N[0], num_answers * max_tokens)
    return torch.where(lengths_N > 0, 1 / total.clamp(min=1), 0.0)
