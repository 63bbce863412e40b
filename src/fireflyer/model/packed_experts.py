"""The routed experts of one layer, packed: each expert's gate, up and down projections are one run of bytes.

So a store can hold some experts in memory and leave the others in the file, and a kernel needs one address an expert.

Shapes: N tokens, D hidden size, K experts a token, M = N·K rows in expert order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.model.deterministic import exact_swiglu, weighted_sum
from fireflyer.model.norm import swiglu
from fireflyer.model.routing import expert_counts
from fireflyer.model.row_tiles import RowTiles
from fireflyer.numerics.integer import Kind, expert_shapes
from fireflyer.numerics.linear import packed_linear
from fireflyer.numerics.native.library import ExpertTable, Library, library


class ExpertBytes(Protocol):
    """Where the experts' bytes are."""

    @property
    def at_once(self) -> int:
        """Experts that one call of `take` may ask for."""
        ...

    def take(self, experts: Sequence[int]) -> list[Tensor]:
        """The (bytes,) uint8 of each, good until the next call."""
        ...

    def in_order(self, experts: Sequence[int]) -> list[int]:
        """The same experts in the order in which the fewest have to be read."""
        ...


class PackedExperts(nn.Module):
    """`packed` (E, bytes) uint8 is unset until it is loaded; a row is what `pack_expert` makes.

    store: where to take the bytes from instead of `packed`.
    """

    packed: Tensor

    def __init__(self, config: ModelConfig, kind: Kind) -> None:
        super().__init__()
        self.shapes = expert_shapes(kind, config.hidden_size, config.moe_intermediate_size)
        """Of gate, up and down, in the order of their bytes."""
        num_bytes = sum(shape.num_bytes for shape in self.shapes)
        self.register_buffer("packed", torch.empty(config.n_routed_experts, num_bytes, dtype=torch.uint8))
        self.store: ExpertBytes | None = None
        self._table: ExpertTable | None = None

    def take(self, experts: Sequence[int]) -> list[Tensor]:
        """Each expert's bytes."""
        return [self.packed[expert] for expert in experts] if self.store is None else self.store.take(experts)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, tiles: RowTiles | None = None) -> Tensor:
        kernels = library()
        if kernels is None:
            return self._one_by_one(x_ND, indices_NK, weights_NK, tiles is not None)
        indices_NK, weights_NK = indices_NK.contiguous(), weights_NK.float().contiguous()
        if self.store is not None:
            return self._from_store(kernels, self.store, x_ND, indices_NK, weights_NK)
        if self._table is None or self._table.memory[0] is not self.packed:
            self._table = ExpertTable.stacked(self.packed, self.shapes)
        return kernels.experts(self._table, x_ND, indices_NK, weights_NK)

    def by_kernels(self, kernels: Library, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """`forward` of a store's experts, for callers that have the kernels; indices and weights are contiguous."""
        assert self.store is not None
        return self._from_store(kernels, self.store, x_ND, indices_NK, weights_NK)

    def _from_store(
        self, kernels: Library, store: ExpertBytes, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor
    ) -> Tensor:
        """As many experts at a time as the store can hold: the same numbers, whatever it holds."""
        rows_MD = x_ND.new_empty(indices_NK.numel(), x_ND.shape[1])
        order = store.in_order(indices_NK.unique().tolist())
        table = ExpertTable.some(self.packed.shape[0], {}, self.shapes)
        for start in range(0, len(order), store.at_once):
            some = order[start : start + store.at_once]
            blocks = dict(zip(some, store.take(some), strict=True))
            kernels.fill_rows(ExpertTable.some(self.packed.shape[0], blocks, self.shapes), x_ND, indices_NK, rows_MD)
        return kernels.sum_rows(table, rows_MD, indices_NK, weights_NK)

    def _one(self, x_XD: Tensor, expert: int, exact: bool) -> Tensor:
        """One expert over its rows."""
        parts = self.take([expert])[0].split([shape.num_bytes for shape in self.shapes])
        gate, up, down = zip(parts, self.shapes, strict=True)
        both = torch.cat((packed_linear(x_XD, *gate), packed_linear(x_XD, *up)), dim=-1)
        return packed_linear(exact_swiglu(both) if exact else swiglu(both), *down)

    def _one_by_one(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, exact: bool) -> Tensor:
        """The whole in torch."""
        order_M = indices_NK.flatten().argsort(stable=True)
        rows_MD = x_ND[order_M // indices_NK.shape[1]]
        y_MD = torch.empty_like(rows_MD)
        ends = expert_counts(indices_NK, self.packed.shape[0]).cumsum(0).tolist()
        rows = {
            e: slice(start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start
        }
        for expert in rows if self.store is None else self.store.in_order(list(rows)):
            y_MD[rows[expert]] = self._one(rows_MD[rows[expert]], expert, exact)
        place_M = torch.empty_like(order_M)
        place_M[order_M] = torch.arange(order_M.numel())
        return weighted_sum(y_MD[place_M].unflatten(0, indices_NK.shape), weights_NK)
