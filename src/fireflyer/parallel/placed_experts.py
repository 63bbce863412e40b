"""A layer's routed experts on several ranks by a placement, the busiest of them in several slots; for inference.

Every rank has tokens of its own. Each token goes to a slot of its expert, the replica that `Placement.slot_of` names,
and comes back computed; to the journeys slots are what experts are in training. What a token gets doesn't depend on the
placement, since all replicas hold the same weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fireflyer.config import ModelConfig
from fireflyer.model.routing import expert_counts
from fireflyer.model.row_tiles import RowTiles
from fireflyer.parallel.expert import ParallelExperts
from fireflyer.parallel.placement import SPREAD, Placement


class PlacedExperts(ParallelExperts):
    """This rank's slots; unset until `fill`. Every rank of the group calls it as often, with no tokens too.

    chosen_E: how many of this rank's tokens chose each expert so far, int64.
    """

    chosen_E: Tensor
    _slots_EX: Tensor
    _replicas_E: Tensor

    def __init__(self, config: ModelConfig, placement: Placement, group: ProcessGroup, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        assert placement.ranks == group.size()
        assert placement.num_experts == config.n_routed_experts
        self.placement, self.group, self._rank = placement, group, group.rank()
        self.num_experts = len(placement.experts)  # slots, to `ParallelExperts`
        width, hidden, own = config.moe_intermediate_size, config.hidden_size, placement.slots_per_rank
        self.gate_up_proj = nn.Parameter(torch.empty(own, 2 * width, hidden, dtype=dtype), requires_grad=False)
        self.down_proj = nn.Parameter(torch.empty(own, hidden, width, dtype=dtype), requires_grad=False)
        most = max(map(len, placement.replicas))
        slots_EX = [[*slots, *slots[:1] * (most - len(slots))] for slots in placement.replicas]
        self.register_buffer("_slots_EX", torch.tensor(slots_EX), persistent=False)
        self.register_buffer("_replicas_E", torch.tensor(list(map(len, placement.replicas))), persistent=False)
        self.register_buffer("chosen_E", torch.zeros(config.n_routed_experts, dtype=torch.int64), persistent=False)

    @property
    def own_experts(self) -> tuple[int, ...]:
        """The expert of each of this rank's slots."""
        width = self.placement.slots_per_rank
        return self.placement.experts[self._rank * width : (self._rank + 1) * width]

    def fill(self, expert: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        """Set every slot from its expert's gate and up (2I, D) and down (D, I)."""
        for slot, number in enumerate(self.own_experts):
            gate_up, down = expert(number)
            self.gate_up_proj.data[slot].copy_(gate_up)
            self.down_proj.data[slot].copy_(down)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, tiles: RowTiles | None = None) -> Tensor:
        self.chosen_E += expert_counts(indices_NK, len(self._replicas_E))
        return super().forward(x_ND, self.slots(indices_NK), weights_NK, tiles)

    def slots(self, indices_NK: Tensor) -> Tensor:
        """(N, K) experts to (N, K) slots: `Placement.slot_of` of each."""
        tokens_N1 = torch.arange(indices_NK.shape[0], device=indices_NK.device)[:, None]
        which_NK = (self._rank + tokens_N1 * SPREAD) % self._replicas_E[indices_NK]
        return self._slots_EX[indices_NK, which_NK]
