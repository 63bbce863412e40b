"""Which experts a token goes to (report 2.1.2): gate logits in, expert indices and weights out; the balance around it.

V3: sigmoid scores; a bias steers the choice only; a group counts by the sum of its two best biased scores; weights come
from the unbiased scores, renormalised, scaled once. V2: softmax scores; a group counts by its best score.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.config import ModelConfig
from fireflyer.model.deterministic import exact_sigmoid
from fireflyer.model.norm import at_least_fp32
from fireflyer.model.row_tiles import RowTiles


def stable_top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, largest first; among equals the lowest index wins.

    `torch.topk` promises nothing about equals, and two machines would route differently.
    """
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def route(
    logits_NE: Tensor,
    gate_bias_E: Tensor | None,
    config: ModelConfig,
    tiles: RowTiles | None = None,
    forced_NK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose experts.

    Args:
        logits_NE: (N, E) fp32, the gate's output.
        gate_bias_E: (E,) fp32, or None where the model has none (V2).
        config: its routing fields are read.
        tiles: where given, no row of the result depends on the others.
        forced_NK: (N, K) int64, the experts to take instead of the gate's choice; rows of -1 choose for themselves.
            The weights are the gate's in any case.

    Returns:
        indices_NK: (N, K) int64, best first.
        weights_NK: (N, K) fp32, what each chosen expert's output is multiplied by.
        scores_NE: (N, E) fp32, the unbiased affinities.
    """
    if config.scoring_func == "sigmoid":
        scores_NE = logits_NE.sigmoid() if tiles is None else exact_sigmoid(logits_NE)
    else:
        scores_NE = logits_NE.softmax(-1)
    with torch.no_grad():
        choice_NE = scores_NE if gate_bias_E is None else scores_NE + gate_bias_E
        if config.n_group > 1 and config.topk_method != "greedy":
            choice_NE = _close_groups(choice_NE, config)
        indices_NK = stable_top_k(choice_NE, config.num_experts_per_tok)
        if forced_NK is not None:
            indices_NK = torch.where(forced_NK < 0, indices_NK, forced_NK)
    weights_NK = scores_NE.gather(1, indices_NK)
    if config.norm_topk_prob:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    return indices_NK, weights_NK * config.routed_scaling_factor, scores_NE


def _close_groups(choice_NE: Tensor, config: ModelConfig) -> Tensor:
    """-inf (never 0: biased scores can be negative) for the experts of all but the best `topk_group` groups."""
    choice_NGX = choice_NE.unflatten(-1, (config.n_group, -1))
    if config.topk_method == "noaux_tc":
        group_scores_NG = choice_NGX.topk(2, dim=-1).values.sum(-1)
    else:
        group_scores_NG = choice_NGX.amax(-1)
    open_groups = stable_top_k(group_scores_NG, config.topk_group)
    closed_NG = torch.ones_like(group_scores_NG, dtype=torch.bool).scatter_(1, open_groups, False)
    return choice_NGX.masked_fill(closed_NG[..., None], float("-inf")).flatten(1)


def sequence_balance_loss(
    scores_NE: Tensor,
    shape_BT: tuple[int, int],
    num_experts_per_tok: int,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The complementary sequence-wise balance loss without its α (report eq. 17-20), averaged over the sequences.

    f counts how often an expert is among the top K of the *unbiased* scores, scaled by E/(K·T); P is the mean over the
    sequence of the scores normalised over all experts. Gradients flow through P alone.

    Args:
        scores_NE: (B·T, E) fp32 affinities, rows in (batch, token) order.
        shape_BT: (B, T).
        total: where the T tokens are a part of their sequences: sums (B, E) over the parts. Their losses add up.

    Returns:
        Scalar; 1 at perfect balance.
    """
    scores_BTE = scores_NE.unflatten(0, shape_BT)
    num_experts, num_tokens = scores_NE.shape[1], shape_BT[1]
    with torch.no_grad():
        top_BTK = stable_top_k(scores_BTE, num_experts_per_tok)
        counts_BE = torch.zeros(shape_BT[0], num_experts, dtype=scores_NE.dtype, device=scores_NE.device)
        counts_BE.scatter_add_(1, top_BTK.flatten(1), torch.ones_like(top_BTK, dtype=counts_BE.dtype).flatten(1))
        if total is not None:
            counts_BE = total(counts_BE)
            num_tokens = counts_BE.sum(-1, keepdim=True) / num_experts_per_tok
        share_BE = counts_BE * (num_experts / (num_experts_per_tok * num_tokens))
    # The same guard as in `route`: sigmoids can all underflow to 0.
    probability_BTE = scores_BTE / (scores_BTE.sum(-1, keepdim=True) + 1e-20)
    probability_BE = probability_BTE.mean(1) if total is None else probability_BTE.sum(1) / num_tokens
    return (share_BE * probability_BE).sum(-1).mean()


def expert_counts(indices_NK: Tensor, num_experts: int) -> Tensor:
    """How many tokens chose each expert: (E,) int64."""
    # Not bincount: it waits for a GPU to learn its own size.
    chosen_M = indices_NK.flatten()
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=chosen_M.device)
    return counts_E.scatter_add_(0, chosen_M, torch.ones_like(chosen_M))


def update_gate_bias_(bias_E: Tensor, counts_E: Tensor, speed: float) -> None:
    """Auxiliary-loss-free balancing (report 2.1.2): +γ for experts under the mean load of the batch, -γ for those over.

    Args:
        bias_E: (E,) fp32, changed in place.
        counts_E: (E,) int64, tokens that chose each expert in the whole global batch of one optimizer step.
        speed: γ.
    """
    # In whole numbers: an fp32 mean of millions of tokens is rounded, and an expert right at the mean would move.
    below_mean_E = torch.sign(counts_E.sum() - counts_E * counts_E.numel())
    bias_E.add_(below_mean_E.to(bias_E.dtype), alpha=speed)


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: the busiest expert's load over the mean load, minus 1; 0 is perfect balance (arXiv 2408.15664)."""
    return int(counts_E.max()) * counts_E.numel() / int(counts_E.sum()) - 1


def gate_logits(x_ND: Tensor, weight_ED: Tensor, tiles: RowTiles | None = None) -> Tensor:
    """(N, E) in fp32 at least whatever the model's dtype, under autocast too: a gate in bf16 chooses other experts."""
    with torch.autocast(x_ND.device.type, enabled=False):
        x_ND, weight_ED = at_least_fp32(x_ND), at_least_fp32(weight_ED)
        return F.linear(x_ND, weight_ED) if tiles is None else tiles.linear(x_ND, weight_ED)
