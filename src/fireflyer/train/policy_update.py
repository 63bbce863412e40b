"""One part of a policy batch through the model: GRPO's loss, and what it tells of the policy.

In: the trunk, rows, the settings. Out: the loss with its gradient, sums of measures, and the routing of real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fireflyer.data.packing import NO_LABEL
from fireflyer.model.decoder import Decoder, TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.train.policy import PolicyTerms, chosen_logprobs, policy_terms
from fireflyer.train.policy_batch import PolicyBatch
from fireflyer.train.post_training_settings import GrpoSettings


@dataclass(frozen=True)
class PolicyPart:
    """terms: of the answers' tokens. tokens: how many those are. entropy: summed over them, before the update."""

    terms: PolicyTerms
    tokens: int
    entropy: Tensor
    routing: list[Routing]
    """Of tokens of prompts and answers, padding left out."""


def policy_part(
    trunk: Callable[..., TrunkOutput], model: Decoder, batch: PolicyBatch, settings: GrpoSettings
) -> PolicyPart:
    """The loss of these rows; it is a share of the whole batch's, by `batch.weights_BT`."""
    out = trunk(batch.input_ids_BT, num_mtp=0, forced_experts=_forced(model, batch.experts_BTLK))
    answers_BT = batch.labels_BT != NO_LABEL
    logp_N, entropy_N = chosen_logprobs(out.hidden_BTD[answers_BT], model.head_weight, batch.labels_BT[answers_BT])
    terms = policy_terms(
        logp_N,
        batch.old_logprobs_BT[answers_BT],
        batch.advantages_BT[answers_BT],
        batch.weights_BT[answers_BT],
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        ref_logp_N=None if batch.ref_logprobs_BT is None else batch.ref_logprobs_BT[answers_BT],
        kl_weight=settings.kl_weight,
    )
    real_N = batch.real_BT.flatten()
    routing = [
        replace(layer, scores_NE=layer.scores_NE[real_N].detach(), indices_NK=layer.indices_NK[real_N])
        for layer in out.routing
    ]
    return PolicyPart(terms, logp_N.numel(), entropy_N.sum(), routing)


@torch.no_grad()
def answer_logprobs(
    model: Decoder, pairs: Sequence[tuple[list[int], list[int]]], *, rows: int, pad_id: int
) -> list[list[float]]:
    """Log-probabilities of the answers' tokens of (prompt, answer) ids by a model that isn't trained: the reference."""
    found: list[list[float]] = []
    device = model.head_weight.device
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        width = max(len(prompt) + len(answer) for prompt, answer in part) - 1
        ids_BT = torch.full((len(part), width), pad_id)
        for row, (prompt, answer) in enumerate(part):
            ids_BT[row, : len(prompt) + len(answer) - 1] = torch.tensor([*prompt, *answer][:-1])
        hidden_BTD = model.trunk(ids_BT.to(device), num_mtp=0).hidden_BTD
        for row, (prompt, answer) in enumerate(part):
            first = len(prompt) - 1
            hidden_ND = hidden_BTD[row, first : first + len(answer)]
            logp_N, _ = chosen_logprobs(hidden_ND, model.head_weight, torch.tensor(answer, device=device))
            found.append(logp_N.tolist())
    return found


def _forced(model: Decoder, experts_BTLK: Tensor | None) -> dict[int, Tensor] | None:
    if experts_BTLK is None:
        return None
    layers = [index for index, _ in model.gates() if index < model.config.num_hidden_layers]
    return {layer: experts_BTLK[:, :, place].flatten(0, 1) for place, layer in enumerate(layers)}
