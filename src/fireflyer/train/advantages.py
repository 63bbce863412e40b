"""How much better an answer was than the others to its problem, and how much each of its tokens counts. Pure.

In: rewards of P problems with G answers each; lengths of the answers. Out: advantages, and weights of tokens that sum
over the whole batch to what the objective divides by, so that no way of splitting a batch changes the loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LengthRule = Literal["answer", "token", "constant"]

_TINY = 1e-6
"""Beside the standard deviation: only keeps rewards that differ by rounding from being blown up."""


def group_advantages(rewards_PG: Tensor, *, by_std: bool = True) -> Tensor:
    """A = (r - mean) / std over each group (V3 report, eq. 28); without `by_std` r - mean (Dr. GRPO, arXiv 2503.20783).

    Args:
        rewards_PG: (P, G) finite; G at least 2.
        by_std: divide by the group's standard deviation (population, as the report writes it).

    Returns:
        (P, G) fp64, each row with the sum 0; exactly 0 in rows whose rewards are all equal.
    """
    rewards_PG = rewards_PG.double()
    # A mean of equal numbers is off by rounding, and divided by a deviation of that size it would be a whole advantage.
    equal_P1 = (rewards_PG == rewards_PG[:, :1]).all(1, keepdim=True)
    centred_PG = rewards_PG - rewards_PG.mean(1, keepdim=True)
    if by_std:
        centred_PG = centred_PG / (centred_PG.square().mean(1, keepdim=True).sqrt() + _TINY)
    return centred_PG.masked_fill(equal_P1, 0.0)


def equal_groups(rewards_PG: Tensor) -> Tensor:
    """(P,) whether all of a group's rewards are equal: it teaches nothing."""
    return (rewards_PG == rewards_PG[:, :1]).all(1)


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
