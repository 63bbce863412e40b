"""The moving average of the parameters: an early look at how the run would do after its decay (report 3.2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fireflyer.parallel.ranks import ALONE, Ranks


@torch.no_grad()
def update_average_(average: dict[str, Tensor], model: nn.Module, decay: float, ranks: Ranks = ALONE) -> None:
    """Move an exponential moving average of the parameters, what of them lies here, by one step; fp32 on the CPU.

    An empty average begins as the parameters are.
    """
    for name, parameter in model.named_parameters():
        value = ranks.local(parameter.detach()).to("cpu", torch.float32)
        if name in average:
            average[name].lerp_(value, 1 - decay)
        else:
            average[name] = value.clone()
