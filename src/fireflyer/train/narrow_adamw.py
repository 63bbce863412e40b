"""AdamW whose two moments are kept in bf16, as in V3's own run (report 3.3.3): half of the optimizer's memory.

In: fp32 parameters with fp32 gradients. Each step is computed in fp32, and the moments are then rounded to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_AT_A_TIME = 1 << 20  # numbers whose moments are in fp32 at one time


class NarrowAdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW; `state` must hold "step" (fp32 scalar), "exp_avg" and "exp_avg_sq" of each parameter."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["step"] += 1
                    whole = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                    for part in _stretches(whole):
                        _update_(*part, group=group, step=float(state["step"]))


def _stretches(tensors: tuple[Tensor, ...]) -> Iterable[tuple[Tensor, ...]]:
    """The same stretch of each, one after the other; all at once of what is spread over ranks, which can't be cut."""
    if type(tensors[1]) is not Tensor:
        return [tensors]
    return zip(*(tensor.view(-1).split(_AT_A_TIME) for tensor in tensors), strict=True)


def _update_(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, *, group: dict[str, Any], step: float
) -> None:
    """One AdamW step on a stretch of a parameter, in place (arXiv 1711.05101, algorithm 2)."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    mean = first.float().lerp_(grad, 1 - beta1)
    square = second.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    first.copy_(mean)
    second.copy_(square)
    weight.mul_(1 - lr * group["weight_decay"])
    spread = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight.addcdiv_(mean, spread, value=-lr / (1 - beta1**step))
