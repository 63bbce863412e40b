"""The number formats of a run: of its matrix products, and whether the device has them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.model.fp8_layers import use_fp8
from fireflyer.numerics.fp8_matmul import unavailable
from fireflyer.numerics.fp8_tiles import BLOCK, ROW_TILE
from fireflyer.train.settings import Recipe

EMULATED = (
    "FP8 matrix products are emulated on this CPU: the numbers that a card would compute, and no faster than"
    " --set precision.matmul=dtype"
)


def autocast(recipe: Recipe) -> AbstractContextManager[Any]:
    """bf16 for the matrix products where the recipe says so; weights, gradients, moments and losses stay fp32."""
    if recipe.dtype != "bf16":
        return nullcontext()
    return torch.autocast(recipe.device.partition(":")[0], dtype=torch.bfloat16)


def check_precision(recipe: Recipe) -> None:
    """Raises UserError where the recipe's device can't do what [precision] asks for."""
    if recipe.precision.matmul == "fp8" and (reason := unavailable(recipe.device)):
        raise UserError(
            f'precision.matmul = "fp8" on device = {recipe.device}: {reason}; --set precision.matmul=dtype,'
            " or --set device=cpu to emulate it"
        )


def set_precision(model: Decoder, recipe: Recipe) -> str | None:
    """Turn a model's layers into what [precision] asks for, in place. Returns what a person should know of it."""
    if recipe.precision.matmul != "fp8":
        return None
    use_fp8(model, BLOCK if recipe.precision.gradient_tile == "128x128" else ROW_TILE)
    return EMULATED if recipe.device == "cpu" else None
