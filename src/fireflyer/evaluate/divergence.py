"""How far a model's predictions lie from those of the model that it was made of: packed against full weights.

In: two Decoders of one vocabulary, held-out rows. Out: what the rounding of weights and activations costs, in nats, and
how often the first choice is another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fireflyer.data.held_out import HeldOutRows
from fireflyer.data.packing import NO_LABEL, Batch
from fireflyer.model.decoder import Decoder

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Divergence:
    """Means over all labels, in nats: `reference_loss` and `loss` of the two, `kl` of the reference's distribution from
    the model's; `agreement`: share of places where both hold the same token for the likeliest."""

    reference_loss: float
    loss: float
    kl: float
    agreement: float


@torch.no_grad()
def divergence(reference: Decoder, model: Decoder, rows: HeldOutRows, *, mask_documents: bool = False) -> Divergence:
    """Compare the main heads on every label of the rows. `mask_documents`: as `held_out_likelihood` takes it."""
    sums = torch.zeros(4, dtype=torch.float64)
    for batch in rows.batches:
        labels_N = batch.labels_BT.flatten()
        counts_N = labels_N != NO_LABEL
        hidden = [_hidden(one, batch, mask_documents)[counts_N] for one in (reference, model)]
        labels_N = labels_N[counts_N]
        step = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
        for start in range(0, len(labels_N), step):
            part = slice(start, start + step)
            heads = [one.head(rows_ND[part]).float() for one, rows_ND in zip((reference, model), hidden, strict=True)]
            logs = [head.log_softmax(-1) for head in heads]
            sums += torch.stack(
                [
                    *(F.nll_loss(log, labels_N[part], reduction="sum").double() for log in logs),
                    F.kl_div(logs[1], logs[0], reduction="sum", log_target=True).double(),
                    (logs[0].argmax(-1) == logs[1].argmax(-1)).sum().double(),
                ]
            )
    return Divergence(*(sums / max(rows.num_labels, 1)).tolist())


def _hidden(model: Decoder, batch: Batch, mask_documents: bool) -> torch.Tensor:
    out = model.trunk(
        batch.input_ids_BT,
        positions=batch.positions_BT,
        document_ids=batch.document_ids_BT if mask_documents else None,
        num_mtp=0,
    )
    return out.hidden_BTD.flatten(0, 1)
