"""How well a model predicts text that it was never trained on: held-out rows in, nats a label and bits a byte out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fireflyer.data.held_out import HeldOutRows
from fireflyer.data.packing import NO_LABEL
from fireflyer.model.decoder import Decoder

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Likelihood:
    """`loss`: mean negative log-likelihood of a label (nats), comparable within one tokenizer; `bits_per_byte` of the
    text, comparable between all."""

    loss: float
    bits_per_byte: float


@torch.no_grad()
def held_out_likelihood(model: Decoder, rows: HeldOutRows, *, mask_documents: bool = False) -> Likelihood:
    """Score the main head on every label of the rows. The model, its gates and the RNG are left as they were.

    `mask_documents`: documents don't see each other, as the model was trained; the rows must have been packed so.
    """
    device = model.device
    total = 0.0
    for batch in rows.batches:
        out = model.trunk(
            batch.input_ids_BT.to(device),
            positions=batch.positions_BT.to(device),
            document_ids=batch.document_ids_BT.to(device) if mask_documents else None,
            num_mtp=0,
        )
        total += _sum_of_losses(model, out.hidden_BTD.flatten(0, 1), batch.labels_BT.to(device).flatten())
    return Likelihood(total / max(rows.num_labels, 1), rows.bits_per_byte(total))


def _sum_of_losses(model: Decoder, hidden_ND: Tensor, labels_N: Tensor) -> float:
    """In chunks of rows, since the logits of a large vocabulary would be the largest tensor of the evaluation."""
    step = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    total = 0.0
    for start in range(0, len(labels_N), step):
        logits_NV = model.head(hidden_ND[start : start + step]).float()
        labels = labels_N[start : start + step]
        total += float(F.cross_entropy(logits_NV, labels, ignore_index=NO_LABEL, reduction="sum"))
    return total
