"""DPO (arXiv 2305.18290) over whole answers: log-probabilities of pairs in, the loss and its measures out.

    h = (log π(chosen) - log π(rejected)) - (log π_ref(chosen) - log π_ref(rejected))
    loss = - (1 - s) log σ(β h) - s log σ(-β h), its mean over the batch's pairs

s is label_smoothing (conservative DPO: how often a pair is the wrong way round). B pairs of a part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.data.packing import NO_LABEL, Batch
from fireflyer.model.decoder import Decoder, TrunkOutput
from fireflyer.train.policy import chosen_logprobs


@dataclass(frozen=True)
class PreferenceTerms:
    """Sums over the part's pairs; `loss` has the gradient. Rewards are β (log π - log π_ref)."""

    loss: Tensor
    margin: Tensor
    correct: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def preference_terms(logp_B2: Tensor, ref_logp_B2: Tensor, beta: float, label_smoothing: float) -> PreferenceTerms:
    """(B, 2) log-probabilities, chosen first, by the model (with gradient) and by the reference."""
    reward_B2 = beta * (logp_B2 - ref_logp_B2)
    margin_B = reward_B2[:, 0] - reward_B2[:, 1]
    loss_B = -(1 - label_smoothing) * F.logsigmoid(margin_B) - label_smoothing * F.logsigmoid(-margin_B)
    chosen, rejected = reward_B2.detach().sum(0)
    return PreferenceTerms(loss_B.sum(), chosen - rejected, (margin_B.detach() > 0).sum(), chosen, rejected)


def answer_logprobs(model: Decoder, out: TrunkOutput, rows: Batch, normalize_length: bool) -> Tensor:
    """(B, 2) log-probability of each row's two answers: the sum over their tokens, or the mean."""
    learnt_BT = rows.labels_BT != NO_LABEL
    logp_N, _ = chosen_logprobs(out.hidden_BTD[learnt_BT], model.head_weight, rows.labels_BT[learnt_BT])
    row_BT = torch.arange(len(learnt_BT), device=learnt_BT.device)[:, None].expand_as(learnt_BT)
    answer_N = (row_BT * 2 + rows.document_ids_BT)[learnt_BT]
    sums = logp_N.new_zeros(2 * len(learnt_BT)).index_add(0, answer_N, logp_N)
    if normalize_length:
        sums = sums / torch.bincount(answer_N, minlength=len(sums))
    return sums.view(-1, 2)
