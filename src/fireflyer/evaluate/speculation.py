"""How often the MTP head's draft is the token that the model itself then says: what speculation would gain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from fireflyer.data.packing import NO_LABEL, Batch
from fireflyer.model.decoder import Decoder

_TOGETHER = 128


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
    for start in range(0, len(sequences), _TOGETHER):
        part = [s for s in sequences[start : start + _TOGETHER] if len(s[0]) - s[1] >= 2]
        if not part:
            continue
        # Padding at the right is seen by no token before it.
        tokens = pad_sequence([torch.tensor(ids) for ids, _ in part], batch_first=True).to(model.device)
        drafts = model.head(model.trunk(tokens, num_mtp=1).mtp_hidden[0]).argmax(-1)
        for row, (ids, prompt_length) in enumerate(part):
            # Row i of depth 1 knows the tokens up to i+1 and drafts token i+2.
            first = prompt_length + 1
            accepted += int((drafts[row, first - 2 : len(ids) - 2] == tokens[row, first : len(ids)]).sum())
            drafted += len(ids) - first
    return accepted / drafted if drafted else None


@torch.no_grad()
def draft_agreement(model: Decoder, batch: Batch, *, mask_documents: bool = False) -> float | None:
    """Share of a batch's positions where depth 1 says the token that the model itself says next; a training measure.

    Both are shown the text, not their own tokens, so that it costs one forward pass. Positions without a label don't
    count. None without an MTP module, or where no position counts.
    """
    if not model.config.num_nextn_predict_layers:
        return None
    device = model.device
    out = model.trunk(
        batch.input_ids_BT.to(device),
        positions=batch.positions_BT.to(device),
        document_ids=batch.document_ids_BT.to(device) if mask_documents else None,
        num_mtp=1,
    )
    # Row i of depth 1 knows the tokens up to i+1 and says token i+2, as row i+1 of the model does.
    counts_X = batch.labels_BT[:, 1:] != NO_LABEL
    if not bool(counts_X.any()):
        return None
    drafts_X = model.head(out.mtp_hidden[0][counts_X.to(device)]).argmax(-1)
    says_X = model.head(out.hidden_BTD[:, 1:][counts_X.to(device)]).argmax(-1)
    return float((drafts_X == says_X).double().mean())
