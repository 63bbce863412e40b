"""The routed experts of one layer, handed out by a store one at a time: the arithmetic of `Experts`, to the bit.

Shapes: N tokens, D hidden size, K experts a token, M = N·K rows in expert order, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.model.deterministic import swiglu_layer, weighted_sum
from fireflyer.model.norm import swiglu, weighted_swiglu
from fireflyer.model.packed_experts import ExpertBytes
from fireflyer.model.routing import expert_counts
from fireflyer.model.row_tiles import RowTiles
from fireflyer.numerics.native.library import ExpertTable, Library

FEW_TOKENS = 3
"""Up to here tokens go through their experts one by one on a CPU; beyond, sorting them by expert is cheaper."""


class StoredExperts(nn.Module):
    """`store` gives an expert as the bytes of gate and up (2I, D), then of down (D, I). For inference on a CPU."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, store: ExpertBytes) -> None:
        super().__init__()
        self.num_experts, self.dtype, self.store = config.n_routed_experts, dtype, store
        self._gate_up_shape = (2 * config.moe_intermediate_size, config.hidden_size)
        self._down_shape = (config.hidden_size, config.moe_intermediate_size)

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gate and up (2I, D), and down (D, I), good until the next call."""
        numbers = self.store.take([expert])[0].view(self.dtype)
        count = self._gate_up_shape[0] * self._gate_up_shape[1]
        return numbers[:count].view(self._gate_up_shape), numbers[count:].view(self._down_shape)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, tiles: RowTiles | None = None) -> Tensor:
        order_M = indices_NK.flatten().argsort(stable=True)
        place_NK = torch.empty_like(order_M)
        place_NK[order_M] = torch.arange(order_M.numel())
        place_NK = place_NK.view(indices_NK.shape)
        rows_MD = x_ND[order_M // indices_NK.shape[1]]
        weight_M = weights_NK.to(x_ND.dtype).flatten()[order_M]
        few = x_ND.shape[0] <= FEW_TOKENS
        y_MD = torch.empty_like(rows_MD)
        for expert, own in self._rows_by_expert(indices_NK):
            gate_up, down = self.matrices(expert)
            if tiles is not None:
                y_MD[own] = swiglu_layer(rows_MD[own], gate_up, down, tiles)
            elif few:
                for row in range(own.start, own.stop):
                    y_MD[row] = F.linear(swiglu(F.linear(rows_MD[row : row + 1], gate_up)), down)[0]
            else:
                y_MD[own] = F.linear(weighted_swiglu(F.linear(rows_MD[own], gate_up), weight_M[own]), down)
        if tiles is not None:
            return weighted_sum(y_MD[place_NK], weights_NK)
        if few:
            weights_NK = weights_NK.to(y_MD.dtype)
            return torch.cat([weights_NK[n : n + 1] @ y_MD[place_NK[n]] for n in range(len(x_ND))])
        return F.embedding_bag(place_NK, y_MD, mode="sum")

    def by_kernels(self, kernels: Library, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """A decoding step's experts as the native kernels compute those in memory, to the bit; x fp32."""
        rows_MD = x_ND.new_empty(indices_NK.numel(), x_ND.shape[1])
        table = None
        for expert in self.store.in_order(indices_NK.unique().tolist()):
            table = ExpertTable.one(self.num_experts, expert, *self.matrices(expert))
            kernels.fill_rows(table, x_ND, indices_NK, rows_MD)
        assert table is not None
        return kernels.sum_rows(table, rows_MD, indices_NK, weights_NK)

    def _rows_by_expert(self, indices_NK: Tensor) -> list[tuple[int, slice]]:
        """Each chosen expert with its rows of M, in the order of least reading."""
        ends = expert_counts(indices_NK, self.num_experts).cumsum(0).tolist()
        rows = {
            e: slice(start, end) for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)) if end > start
        }
        return [(expert, rows[expert]) for expert in self.store.in_order(list(rows))]
