"""Context parallelism: every rank of a group holds some of each sequence's tokens, and attention reads all of them.

Queries, feed-forwards and losses stay with their tokens. What travels is what a cache would keep, the latent and the
rope key, 576 numbers a token and layer in V3: gathered before attention, and its gradient summed where the token is.
Masks, positions and documents are the whole sequence's; MTP's shifted tokens are known to every rank. The losses of the
parts add up to the sequence's, so gradients are to be summed over the group, never averaged.

Shape suffixes as in `model/`; S tokens of the whole sequence, T of this rank's part, R ranks of the group (in `R`
places only; no rope dimension appears here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from fireflyer.config import ModelConfig
from fireflyer.model.attention import AttentionGroup, AttentionInputs
from fireflyer.model.decoder import rotary


def head_tail_places(num_tokens: int, ranks: int) -> Tensor:
    """(R, T) int64: the tokens of each rank, rising.

    The sequence is cut into 2·R pieces, and rank r has the r-th from either end: a causal query reads what lies before
    it, and so every rank reads as much as any other.
    """
    pieces_RX = torch.arange(num_tokens).view(2 * ranks, -1)
    return torch.cat((pieces_RX[:ranks], pieces_RX.flip(0)[:ranks]), dim=1)


@dataclass(frozen=True)
class SequencePart:
    """The tokens of every sequence of S that are this rank's; with one row of places, all of them."""

    places_RT: Tensor
    group: ProcessGroup | None

    @property
    def num_tokens(self) -> int:
        return self.places_RT.numel()

    @property
    def places_T(self) -> Tensor:
        return self.places_RT[0 if self.group is None else self.group.rank()]

    def places(self, depth: int = 0) -> Tensor:
        """(T',) this rank's tokens i that have a token i + depth in the sequence: the first of its tokens."""
        return self.places_T[self.places_T < self.num_tokens - depth]

    def own(self, x_BS: Tensor) -> Tensor:
        """(B, S - k) to (B, T'): the columns of this rank's tokens; k > 0 as MTP's labels have it."""
        return x_BS if self.group is None else x_BS[:, self.places(self.num_tokens - x_BS.shape[1])]

    def total(self, x: Tensor) -> Tensor:
        """The sum over the group; no gradient goes through."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x


def whole_sequence(num_tokens: int, device: torch.device | str) -> SequencePart:
    """No parts."""
    return SequencePart(torch.arange(num_tokens, device=device)[None], None)


def sequence_part(num_tokens: int, group: ProcessGroup | None, device: torch.device | str) -> SequencePart:
    """This rank's part of sequences of so many tokens, see `check_context`; whole ones without others."""
    if group is None or group.size() == 1:
        return whole_sequence(num_tokens, device)
    return SequencePart(head_tail_places(num_tokens, group.size()).to(device), group)


class _GatheredLatents:
    """What attention reads instead of a cache: the latents of the whole sequence, or all but its last `depth`."""

    def __init__(self, part: SequencePart, depth: int, group: ProcessGroup) -> None:
        rows = part.num_tokens - depth
        self._group = group
        # Ranks without the last tokens have more rows: the others fill up to the same number.
        self._rows = int((part.places_RT < rows).sum(1).max())
        self._order_S = part.places_RT[:, : self._rows].flatten().argsort()[:rows]

    def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
        filled_BTC = F.pad(latent_BTC, (0, 0, 0, self._rows - latent_BTC.shape[1]))
        latent_BSC = _Gather.apply(filled_BTC, self._group).transpose(0, 1).flatten(1, 2)
        return latent_BSC.index_select(1, self._order_S)


class _Gather(torch.autograd.Function):
    """(B, T, C) of every rank, (R, B, T, C); its gradient is each token's, summed over the ranks that read it."""

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        x_RBTC = x_BTC.new_empty(group.size(), *x_BTC.shape)
        dist.all_gather(list(x_RBTC.unbind()), x_BTC.contiguous(), group=group)
        return x_RBTC

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None]:
        grad_BTC = grads[0].new_empty(grads[0].shape[1:])
        dist.reduce_scatter(grad_BTC, list(grads[0].contiguous().unbind()), group=ctx.group)
        return grad_BTC, None


@dataclass(frozen=True)
class Sequences:
    """`TokenRows` of whole rows and the part of them that is computed here."""

    input_ids_BS: Tensor
    positions_BS: Tensor
    document_ids_BS: Tensor | None
    """None: tokens of all documents see each other."""
    part: SequencePart

    @property
    def num_tokens(self) -> int:
        return self.part.num_tokens

    def ids(self, depth: int = 0) -> Tensor:
        """(B, T') the tokens i + depth of this rank's tokens i."""
        return self.part.own(self.input_ids_BS[:, depth:])

    def attention(self, config: ModelConfig, depth: int = 0) -> AttentionInputs:
        """How this rank's tokens i that have a token i + depth attend."""
        rows = self.part.num_tokens - depth
        positions_BT = self.part.own(self.positions_BS[:, :rows])
        group = self.part.group
        latents = None if group is None else _GatheredLatents(self.part, depth, group)
        attending = AttentionGroup(positions_BT, self._mask(depth), latents, rows, "expanded")
        return AttentionInputs(*rotary(config, positions_BT), (attending,))

    def _mask(self, depth: int) -> Tensor | None:
        """(B or 1, T', S - depth); None where plain causal attention is meant."""
        if self.part.group is None and self.document_ids_BS is None:
            return None
        rows = self.part.num_tokens - depth
        places_S = torch.arange(rows, device=self.input_ids_BS.device)
        mask_BTS = (places_S <= self.part.places(depth)[:, None])[None]
        if self.document_ids_BS is not None:
            documents_BS = self.document_ids_BS[:, :rows]
            mask_BTS = mask_BTS & (self.part.own(documents_BS)[:, :, None] == documents_BS[:, None, :])
        return mask_BTS
