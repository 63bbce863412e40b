"""Expert parallelism: each rank of a group holds some of the routed experts, and tokens travel to theirs and back.

In: rows in the order of their experts. Out: the same rows, computed wherever the expert is. Both journeys are one
uneven all-to-all each, and so are their gradients; every rank takes part in each, with no rows too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd

from fireflyer.config import ModelConfig
from fireflyer.model.experts import Experts, weighted_swiglu
from fireflyer.model.fp8_layers import Fp8Experts
from fireflyer.model.row_tiles import RowTiles


class ParallelExperts(Experts):
    """This rank's part of a layer's experts, the `place`-th of the group; called with all tokens of this rank."""

    def __init__(self, config: ModelConfig, whole: Experts, group: ProcessGroup) -> None:
        nn.Module.__init__(self)
        ranks, place = group.size(), group.rank()
        self.num_experts = config.n_routed_experts
        self.group = group
        self.gate_up_proj = nn.Parameter(whole.gate_up_proj.detach().chunk(ranks)[place].clone())
        self.down_proj = nn.Parameter(whole.down_proj.detach().chunk(ranks)[place].clone())

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, tiles: RowTiles | None = None) -> Tensor:
        assert tiles is None, "tiles are for inference"
        return self.sorted_by_expert(x_ND, indices_NK, weights_NK)

    def feed_forward(self, x_MD: Tensor, weight_M: Tensor, ends_E: Tensor) -> Tensor:
        """weight · expert(x), as `Experts`: there, computed, and back."""
        counts_E = ends_E.long().diff(prepend=ends_E.new_zeros(1, dtype=torch.long))
        sent_RX = counts_E.view(self.group.size(), -1)
        received_RX = torch.empty_like(sent_RX)
        torch.distributed.all_to_all_single(received_RX, sent_RX.contiguous(), group=self.group)
        out, back = sent_RX.sum(1).tolist(), received_RX.sum(1).tolist()
        # The weight travels as one more number of its row.
        rows = torch.cat((x_MD, weight_M.to(x_MD.dtype)[:, None]), dim=1)
        there = travelled(rows, out, back, self.group)
        order, home = _by_expert(received_RX)
        there = there.index_select(0, order)
        y = self._computed(there[:, :-1], there[:, -1], received_RX.sum(0).cumsum(0).to(torch.int32))
        return travelled(y.index_select(0, home), back, out, self.group)

    def _computed(self, x_MD: Tensor, weight_M: Tensor, ends_X: Tensor) -> Tensor:
        if len(x_MD):
            return super().feed_forward(x_MD.contiguous(), weight_M.contiguous(), ends_X)
        # No rows: nothing to compute, but the graph must go on, since the gradients' journeys need every rank.
        return F.linear(weighted_swiglu(F.linear(x_MD, self.gate_up_proj[0]), weight_M), self.down_proj[0])


class ParallelFp8Experts(ParallelExperts, Fp8Experts):
    """The same, computed in FP8 where the experts are."""

    def __init__(self, config: ModelConfig, whole: Fp8Experts, group: ProcessGroup) -> None:
        super().__init__(config, whole, group)
        self.gradient_tile = whole.gradient_tile


def travelled(rows_MD: Tensor, out: list[int], back: list[int], group: ProcessGroup) -> Tensor:
    """Send `out[r]` rows to each rank r of the group, in order; returns the `back[r]` rows of each, with gradients."""
    return all_to_all_single_autograd(rows_MD.contiguous(), back, out, group)


def _by_expert(received_RX: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that came by (rank, expert): the order that puts each expert's together, and the way home."""
    ranks, experts = received_RX.shape
    expert_M = torch.arange(experts, device=received_RX.device).repeat(ranks).repeat_interleave(received_RX.flatten())
    order = expert_M.argsort(stable=True)
    home = torch.empty_like(order)
    home[order] = torch.arange(len(order), device=order.device)
    return order, home
