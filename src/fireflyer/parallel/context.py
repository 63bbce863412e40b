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
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_gather_tensor_autograd

from fireflyer.config import ModelConfig
from fireflyer.errors import UserError
from fireflyer.model.attention import AttentionGroup, AttentionInputs
from fireflyer.model.decoder import Decoder, TrunkOutput, rotary, run_layers, run_mtp
from fireflyer.model.experts import Routing


def head_tail_places(num_tokens: int, ranks: int) -> Tensor:
    """(R, T) int64: the tokens of each rank, rising.

    The sequence is cut into 2·R pieces, and rank r has the r-th from either end: a causal query reads what lies before
    it, and so every rank reads as much as any other.
    """
    pieces_RX = torch.arange(num_tokens).view(2 * ranks, -1)
    return torch.cat((pieces_RX[:ranks], pieces_RX.flip(0)[:ranks]), dim=1)


def check_context(cp: int, seq_lens: list[int], mtp_depth: int) -> None:
    """Raises UserError where sequences of these lengths can't be cut for cp ranks: which number, and what would do."""
    for seq_len in seq_lens:
        if cp > 1 and seq_len % (2 * cp):
            lower = seq_len // (2 * cp) * 2 * cp
            would = f"{lower} or {lower + 2 * cp}" if lower else f"{2 * cp}"
            raise UserError(
                f"parallel.cp = {cp} cuts a sequence into {2 * cp} equal pieces, and seq_len = {seq_len} doesn't divide"
                f" by {2 * cp}; {would} would"
            )
        if cp > 1 and seq_len // (2 * cp) <= mtp_depth:
            raise UserError(
                f"parallel.cp = {cp} leaves pieces of {seq_len // (2 * cp)} tokens, too short for"
                f" model.num_nextn_predict_layers = {mtp_depth}; seq_len = {2 * cp * (mtp_depth + 1)} would do"
            )


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
        # Its gradient is a reduce-scatter: each token's, summed over the ranks that read it.
        latent_BSC = all_gather_tensor_autograd(filled_BTC.contiguous(), 1, self._group)
        return latent_BSC.index_select(1, self._order_S)


@dataclass(frozen=True)
class Sequences:
    """Whole rows of token ids, and the part of them that is computed here."""

    input_ids_BS: Tensor
    positions_BS: Tensor
    document_ids_BS: Tensor | None
    """None: tokens of all documents see each other."""
    part: SequencePart

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


class Tail(Protocol):
    """The modules that follow the last layer, as `DecoderStack` names them."""

    @property
    def embed_tokens(self) -> nn.Module: ...

    @property
    def norm(self) -> nn.Module: ...

    @property
    def mtp(self) -> nn.ModuleList: ...


def run_tail(
    config: ModelConfig, tail: Tail, hidden_BTD: Tensor, sequences: Sequences, recompute: bool, routing: list[Routing]
) -> TrunkOutput:
    """What follows the last layer, on this rank's tokens."""
    hidden_BTD = tail.norm(hidden_BTD)
    depths = [
        (tail.embed_tokens(sequences.ids(depth)), sequences.attention(config, depth))
        for depth in range(1, min(len(tail.mtp), sequences.part.num_tokens - 1) + 1)
    ]
    mtp_hidden = run_mtp(tail.mtp, hidden_BTD, depths, recompute, routing)
    return TrunkOutput(hidden_BTD, mtp_hidden, routing)


def context_trunk(model: Decoder, sequences: Sequences, *, recompute: bool = False) -> TrunkOutput:
    """`Decoder.trunk` of the tokens that are this rank's."""
    routing: list[Routing] = []
    inputs = sequences.attention(model.config)
    hidden_BTD = run_layers(model.model.layers, model.embed(sequences.ids()), inputs, recompute, routing)
    return run_tail(model.config, model.model, hidden_BTD, sequences, recompute, routing)
