"""The number format of a run's matrix products."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fireflyer.train.settings import Recipe


def autocast(recipe: Recipe) -> AbstractContextManager[Any]:
    """bf16 for the matrix products where the recipe says so; weights, gradients, moments and losses stay fp32."""
    if recipe.dtype != "bf16":
        return nullcontext()
    return torch.autocast(recipe.device.partition(":")[0], dtype=torch.bfloat16)
