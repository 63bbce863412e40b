"""How often the MTP head's draft is the token that the model itself then says: what speculation would gain."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fireflyer.model.decoder import Decoder


@torch.no_grad()
def mtp_acceptance(model: Decoder, sequences: Sequence[tuple[Sequence[int], int]]) -> float | None:
    """Share of the generated tokens that depth 1, shown the tokens before, would have drafted (report 5.4.3).

    Args:
        sequences: (prompt and greedy answer as ids, length of the prompt), each.

    Returns:
        Accepted over drafted, where the first drafted token is the answer's second; None without an MTP module or where
        no answer has two tokens.
    """
    if not model.config.num_nextn_predict_layers:
        return None
    accepted = drafted = 0
    for ids, prompt_length in sequences:
        tokens = torch.tensor([ids], device=model.head_weight.device)
        if len(ids) - prompt_length < 2:
            continue
        drafts = model.head(model.trunk(tokens, num_mtp=1).mtp_hidden[0])[0].argmax(-1)
        # Row i of depth 1 knows the tokens up to i+1 and drafts token i+2.
        first = prompt_length + 1
        said = tokens[0, first:]
        accepted += int((drafts[first - 2 : first - 2 + len(said)] == said).sum())
        drafted += len(said)
    return accepted / drafted if drafted else None
