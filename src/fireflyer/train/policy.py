"""GRPO's objective (V3 report, eq. 26-27) over single tokens: log-probabilities in, the loss and its measures out.

    loss = - Σ_t w_t · ( min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t) - β · (r_t - log r_t - 1) )
    ρ_t = π(t) / π_old(t),  r_t = π_ref(t) / π(t)

The weights w_t are those of `advantages.token_weights`, made for the whole batch: sums of parts add up to its loss.
Shapes: N tokens of answers · D hidden_size · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22
"""Logits held at once, as in losses.py."""


def kl_estimate(logp_N: Tensor, ref_logp_N: Tensor) -> Tensor:
    """r - log r - 1 with r = π_ref / π: never negative, 0 where both agree, its mean over π's samples KL(π, π_ref)."""
    log_r_N = ref_logp_N - logp_N
    return log_r_N.expm1() - log_r_N


@dataclass(frozen=True)
class PolicyTerms:
    """Of one part of a batch. `loss` has the gradient; the rest are sums over tokens, detached."""

    loss: Tensor
    kl: Tensor
    """Sum of `kl_estimate`; 0 without a reference."""
    clipped: Tensor
    """Tokens whose gradient the clip has cut off."""
    gap: Tensor
    """Sum of |log π - log π_old|."""
    gap_max: Tensor


def policy_terms(
    logp_N: Tensor,
    old_logp_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logp_N: Tensor | None = None,
    kl_weight: float = 0.0,
) -> PolicyTerms:
    """The loss of these tokens, all (N,) fp32; what is not `logp_N` has no gradient.

    Args:
        clip_low, clip_high: ε below and above 1. The report has one ε; a larger one above ("clip-higher", DAPO) leaves
            rare tokens more room to grow.
        ref_logp_N, kl_weight: the reference's log-probabilities and β; without them no KL is taken.
    """
    log_ratio_N = logp_N - old_logp_N
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    objective_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    kl_N = torch.zeros_like(logp_N) if ref_logp_N is None else kl_estimate(logp_N, ref_logp_N)
    loss = -(weight_N * (objective_N - kl_weight * kl_N)).sum()
    with torch.no_grad():
        cut_N = (advantage_N > 0) & (ratio_N > 1 + clip_high) | (advantage_N < 0) & (ratio_N < 1 - clip_low)
        gap_N = log_ratio_N.abs()
        gap_max = gap_N.max() if gap_N.numel() else gap_N.sum()
        return PolicyTerms(loss, kl_N.detach().sum(), cut_N.sum(), gap_N.sum(), gap_max)


def chosen_logprobs(hidden_ND: Tensor, head_weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each id, entropy of each distribution), both (N,) fp32, without ever holding all logits.

    Args:
        hidden_ND: the hidden state that predicts each id; its dtype is the matrix products'.
        head_weight_VD: (V, D).
        ids_N: int64.

    Only the log-probabilities have a gradient.
    """
    return _ChosenLogprobs.apply(hidden_ND, head_weight_VD, ids_N)


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocab_size)
    return (slice(start, start + step) for start in range(0, rows, step))


class _ChosenLogprobs(torch.autograd.Function):
    """Head and softmax chunk by chunk; the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logp_N = torch.empty(ids_N.shape, dtype=exact, device=ids_N.device)
        entropy_N = torch.empty_like(logp_N)
        weight_VD = weight_VD.to(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
                log_p_NV = (hidden_ND[rows] @ weight_VD.T).log_softmax(-1, dtype=exact)
                logp_N[rows] = log_p_NV.gather(1, ids_N[rows, None])[:, 0]
                entropy_N[rows] = torch.special.entr(log_p_NV.exp_()).sum(-1)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        grad_N, exact = grads[0], grads[0].dtype
        narrow_VD = weight_VD.to(hidden_ND.dtype)
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
                own_N1 = grad_N[rows, None]
                grad_NV = (hidden_ND[rows] @ narrow_VD.T).softmax(-1, dtype=exact).mul_(-own_N1)
                grad_NV.scatter_add_(1, ids_N[rows, None], own_N1)
                narrow_NV = grad_NV.to(hidden_ND.dtype)
                torch.mm(narrow_NV, narrow_VD, out=grad_hidden_ND[rows])
                grad_weight_VD += narrow_NV.T @ hidden_ND[rows]
        return grad_hidden_ND, grad_weight_VD.to(weight_VD.dtype), None
