"""The decoder over one step's rows. In: spans of answers. Out: hidden states of every row, of main model and MTP.

Rows of all answers go through projections, feed-forward and experts together. In attention they fall into groups: short
spans of the same length (decoding, verifying drafts) attend together in absorbed form; a long piece of a prompt attends
alone, expanded.

Shapes: N rows of the step · B sequences of a group · T rows of each · S cache slots · D hidden_size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fireflyer.config import ModelConfig
from fireflyer.infer.native_trunk import MOST_ROWS, NativeRows, native_trunk
from fireflyer.infer.paged_cache import PagedCache
from fireflyer.infer.scheduler import Span
from fireflyer.model.attention import AttentionGroup
from fireflyer.model.decoder import Decoder, TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.model.row_tiles import RowTiles

_PADDING_ALLOWED = 64
"""Slots that a sequence of a group may be padded by, however short it is; beyond, by its own length at most."""


@dataclass(frozen=True)
class Batch:
    """Rows of one call: `spans` one after the other, each from its `first_rows` on."""

    spans: list[Span]
    first_rows: list[int]
    positions_1N: Tensor
    groups: tuple[AttentionGroup, ...]
    native: NativeRows | None = None
    """The first rows, which the native kernels compute; they are in no group."""


class ModelRunner:
    """A decoder and the cache of its sequences. tiles: for results that don't depend on the other rows of a step."""

    def __init__(self, model: Decoder, cache: PagedCache, tiles: RowTiles | None = None) -> None:
        self.device = model.device
        self._model, self._cache, self._tiles = model, cache, tiles
        self._absorbed_up_to = absorbed_up_to(model.config)
        self._native = native_trunk(model, cache) if tiles is None else None

    def batch(self, spans: Iterable[Span]) -> Batch:
        """Put spans into groups, and their rows into the groups' order."""
        short: dict[int, list[Span]] = {}
        long: list[list[Span]] = []
        for span in spans:
            if span.num_rows <= self._absorbed_up_to:
                short.setdefault(span.num_rows, []).append(span)
            else:
                long.append([span])
        native = [span for same in short.values() for span in same]
        if self._native is None or not 0 < sum(span.num_rows for span in native) <= MOST_ROWS:
            native = []
        grouped = [] if native else [part for same in short.values() for part in _of_similar_length(same)]
        groups = tuple(self._group(part) for part in grouped + long)
        rows = NativeRows.of(native, self._cache.block_size) if native else None
        positions = [rows.positions_N] if rows is not None else []
        positions += [group.positions_BT.flatten() for group in groups]
        ordered = native + [span for part in grouped + long for span in part]
        first_rows = list(itertools.accumulate((span.num_rows for span in ordered[:-1]), initial=0))
        return Batch(ordered, first_rows, torch.cat(positions)[None], groups, rows)

    def trunk(self, batch: Batch, token_ids: Sequence[int]) -> TrunkOutput:
        """The main model over the batch's rows: hidden states (1, N, D) after the last norm, and the routing."""
        parts: list[tuple[Tensor, list[Routing]]] = []
        count = 0
        if self._native is not None and batch.native is not None:
            count = len(batch.native.positions_N)
            parts.append(self._native.trunk(token_ids[:count], batch.native))
        if batch.groups:
            ids_1N = torch.tensor([token_ids[count:]], device=self.device)
            positions_1N = batch.positions_1N[:, count:]
            out = self._model.trunk(ids_1N, positions=positions_1N, groups=batch.groups, tiles=self._tiles)
            parts.append((out.hidden_BTD[0], out.routing))
        routing = (
            parts[0][1] if len(parts) == 1 else [_joined(*both) for both in zip(*(r for _, r in parts), strict=True)]
        )
        return TrunkOutput(_one_below_another([hidden_ND for hidden_ND, _ in parts])[None], [], routing)

    def mtp(self, depth: int, batch: Batch, hidden_ND: Tensor, next_ids: Sequence[int]) -> Tensor:
        """MTP depth `depth` (from 0) over the batch's rows: (N, D)."""
        parts: list[Tensor] = []
        count = 0
        if self._native is not None and batch.native is not None:
            count = len(batch.native.positions_N)
            parts.append(self._native.mtp(depth, hidden_ND[:count], next_ids[:count], batch.native))
        if batch.groups:
            ids_1N = torch.tensor([next_ids[count:]], device=self.device)
            own_1ND, positions_1N = hidden_ND[None, count:].to(self._model.dtype), batch.positions_1N[:, count:]
            parts.append(self._model.mtp_step(depth, own_1ND, ids_1N, positions_1N, batch.groups, self._tiles)[0])
        return _one_below_another(parts)

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """(X, V)"""
        if self._native is not None and hidden_XD.shape[0] <= MOST_ROWS:
            return self._native.logits(hidden_XD)
        return self._model.head(hidden_XD.to(self._model.dtype), self._tiles)

    def _group(self, spans: list[Span]) -> AttentionGroup:
        size, rows = self._cache.block_size, spans[0].num_rows
        stops = [span.stop for span in spans]
        starts_B1 = torch.tensor([[span.start] for span in spans], device=self.device)
        positions_BT = starts_B1 + torch.arange(rows, device=self.device)
        num_slots = max(stops)
        tables = [span.answer.blocks[: -(-span.stop // size)] for span in spans]
        targets = [
            span.answer.blocks[position // size] * size + position % size
            for span in spans
            for position in range(span.start, span.stop)
        ]
        absorbed = rows <= self._absorbed_up_to
        alike = min(stops) == num_slots
        # A next token sees all slots, and the first piece of a prompt is plainly causal: neither needs a mask.
        plain = alike and (rows == 1 or (spans[0].start == 0 and all(span.start == 0 for span in spans)))
        mask_BTS = None if plain else torch.arange(num_slots, device=self.device) <= positions_BT[..., None]
        view = self._cache.view(tables, targets)
        return AttentionGroup(positions_BT, mask_BTS, view, num_slots, "absorbed" if absorbed else "expanded")


def _one_below_another(parts: list[Tensor]) -> Tensor:
    """The native part is fp32; torch's is of the model's dtype."""
    return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts])


def _joined(first: Routing, second: Routing) -> Routing:
    """Of the rows of both; the scores, which the engine doesn't read, are left out."""
    indices_NK = torch.cat((first.indices_NK, second.indices_NK))
    return Routing(first.layer_index, first.scores_NE, indices_NK, (1, len(indices_NK)))


def absorbed_up_to(config: ModelConfig) -> int:
    """Rows of one sequence up to which absorbed attention is cheaper than expanding all its latents once.

    Per slot and head, a row costs 2C - R multiplications absorbed, Q + V expanded, and the expansion L(P + V).
    """
    expansion = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    absorbed = config.latent_dim + config.kv_lora_rank
    expanded = config.qk_head_dim + config.v_head_dim
    return max(expansion // max(absorbed - expanded, 1), 1)


def _of_similar_length(spans: list[Span]) -> list[list[Span]]:
    """Cut where a sequence would be padded to more than twice its length."""
    parts: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.stop, reverse=True):
        longest = parts[-1][0].stop if parts else 0
        if longest and longest - span.stop <= max(span.stop, _PADDING_ALLOWED):
            parts[-1].append(span)
        else:
            parts.append([span])
    return parts
