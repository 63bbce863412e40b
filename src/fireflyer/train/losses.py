"""The training losses (report 2.1.2 and 2.2): hidden states, labels and routing in, sums over this micro-batch out.

Every term is a sum over the micro-batch divided by a count of the *whole* global batch, so that the terms of the
micro-batches (and ranks) simply add up: no split changes the loss, however unevenly the labels are masked.

    total = main + λ·mtp + α·balance
    main     sum of cross entropy over the valid labels / valid labels
    mtp      mean over depths k of (sum over positions valid at depth k / valid labels of the main model)
    balance  sum over MoE layers, MTP's too, of the sequence-wise loss, each the mean over the batch's sequences

The report divides depth k's sum of T-k terms by T; "valid labels of the main model" is that T where labels are masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fireflyer.data.packing import NO_LABEL
from fireflyer.model.decoder import TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.model.routing import sequence_balance_loss
from fireflyer.parallel.context import SequencePart

_CHUNK_ELEMENTS = 1 << 22
"""Logits held at once. On 2 cores 4M (16 MB) was best or near it at vocabularies from 512 to 32768."""


@dataclass(frozen=True)
class LossTerms:
    """Scalars with gradients; `mtp` before λ, `balance` before α."""

    main: Tensor
    mtp: Tensor
    balance: Tensor

    def total(self, mtp_weight: float, sequence_alpha: float) -> Tensor:
        """What the gradient is taken of."""
        return self.main + mtp_weight * self.mtp + sequence_alpha * self.balance


def count_valid(labels: Tensor) -> int:
    """How many positions of a batch have a loss."""
    return int((labels != NO_LABEL).sum())


def mtp_labels(labels_BT: Tensor, document_ids_BT: Tensor | None, depth: int) -> Tensor:
    """(B, T-k) labels of MTP depth k: position i predicts token i+k+1, which is the main label of position i+k.

    With `document_ids_BT` a position whose i+k lies in another document has no loss: its input would mix documents.
    """
    shifted = labels_BT[:, depth:]
    if document_ids_BT is None:
        return shifted
    return shifted.masked_fill(document_ids_BT[:, depth:] != document_ids_BT[:, : shifted.shape[1]], NO_LABEL)


def training_losses(
    out: TrunkOutput,
    head_weight: Tensor,
    labels_BT: Tensor,
    document_ids_BT: Tensor | None,
    *,
    num_experts_per_tok: int,
    valid_in_batch: int,
    rows_in_batch: int,
    part: SequencePart | None = None,
) -> LossTerms:
    """This micro-batch's share of the three terms.

    Args:
        out: of `Decoder.trunk` on this micro-batch.
        head_weight: (vocab, D), shared by all depths.
        labels_BT: (B, T) int64, the next token of each position or -100.
        document_ids_BT: (B, T) when documents are masked from each other, else None.
        valid_in_batch: valid labels in the whole global batch; 0 gives losses of 0.
        rows_in_batch: sequences in the whole global batch.
        part: the tokens of each sequence that `out` is of, where others hold the rest. Labels and documents are the
            whole sequences' all the same.
    """
    scale = 1.0 / max(valid_in_batch, 1)
    main = head_cross_entropy(out.hidden_BTD, head_weight, labels_BT if part is None else part.own(labels_BT)) * scale
    mtp = main.new_zeros(())
    for depth, hidden in enumerate(out.mtp_hidden, start=1):
        labels = mtp_labels(labels_BT, document_ids_BT, depth)
        labels = labels if part is None else part.own(labels)
        mtp = mtp + head_cross_entropy(hidden, head_weight, labels) * (scale / len(out.mtp_hidden))
    balance = balance_loss(out.routing, num_experts_per_tok=num_experts_per_tok, rows_in_batch=rows_in_batch, part=part)
    return LossTerms(main, mtp, balance)


def balance_loss(
    routings: list[Routing], *, num_experts_per_tok: int, rows_in_batch: int, part: SequencePart | None = None
) -> Tensor:
    """The third term alone, of these layers; the arguments are `training_losses`'."""
    total = None if part is None else part.total
    balance = torch.zeros(())
    for routing in routings:
        share = routing.shape_BT[0] / rows_in_batch
        loss = sequence_balance_loss(routing.scores_NE, routing.shape_BT, num_experts_per_tok, total)
        balance = balance + loss * share
    return balance


def head_cross_entropy(hidden: Tensor, head_weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of the cross entropy over the valid labels, without ever holding all logits.

    Args:
        hidden: (..., D); its dtype is the matrix products'.
        head_weight: (vocab, D).
        labels: (...) int64, -100 where no loss is taken.

    Returns:
        Scalar fp32 (fp64 for fp64); 0 when no label is valid.
    """
    return _HeadCrossEntropy.apply(hidden.flatten(0, -2), head_weight, labels.flatten())


def _chunks(rows: int, vocab_size: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocab_size)
    return (slice(start, start + step) for start in range(0, rows, step))


class _HeadCrossEntropy(torch.autograd.Function):
    """Head and cross entropy chunk by chunk, gradients taken in the forward while a chunk's logits are at hand.

    Measured on CPU against one plain call and `F.linear_cross_entropy`: never slower than either at vocabularies of
    256, 4096 and 32768, and the only one whose memory doesn't grow with rows x vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        ctx.weight_dtype = weight_VD.dtype
        weight_VD = weight_VD.to(hidden_ND.dtype)
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needed = any(ctx.needs_input_grad)
        grad_hidden_ND = torch.empty_like(hidden_ND) if needed else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if needed else None
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        for rows in _chunks(hidden_ND.shape[0], weight_VD.shape[0]):
            x_ND, labels = hidden_ND[rows], labels_N[rows]
            valid_N1 = (labels != NO_LABEL)[:, None]
            target_N1 = labels.clamp(min=0)[:, None]
            with torch.autocast(hidden_ND.device.type, enabled=False):
                log_p_NV = (x_ND @ weight_VD.T).log_softmax(-1, dtype=exact)
                total -= (log_p_NV.gather(1, target_N1) * valid_N1).sum()
                if grad_hidden_ND is None or grad_weight_VD is None:
                    continue
                grad_NV = log_p_NV.exp_()
                grad_NV.scatter_add_(1, target_N1, grad_NV.new_full((), -1.0).expand_as(target_N1)).mul_(valid_N1)
                narrow_NV = grad_NV.to(hidden_ND.dtype)
                torch.mm(narrow_NV, weight_VD, out=grad_hidden_ND[rows])
                _add_product_(grad_weight_VD, narrow_NV.T, x_ND)
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # one gradient: the loss is one scalar
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return (
            grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype),
            (grad_weight_VD * grads[0]).to(ctx.weight_dtype),
            None,
        )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)
