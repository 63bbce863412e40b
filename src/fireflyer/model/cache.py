"""What decoding remembers: per layer and token the normalised latent and the rotated rope key, C = L + R numbers.

The decoder speaks to a cache through `LatentCache` alone; `ContiguousCache` is the plain one. Slot j of a sequence
holds its position j, and a query sees the slots up to its own position. So right padding is harmless: a padded slot
lies beyond every real query until a real token overwrites it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fireflyer.config import ModelConfig


class LatentStore(Protocol):
    """What attention asks of a cache."""

    def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
        """Store `latent_BTC` at `positions_BT`; return the first `num_slots` slots, (B, S, C)."""
        ...


class LatentCache(LatentStore, Protocol):
    """What the decoder asks of a cache."""

    lengths: Tensor
    """(B,) int64: tokens held by each sequence; where the next call's tokens go unless it names positions."""


class ContiguousCache:
    """One dense buffer (layers, B, max_length, C); MTP layers have their places after the main ones."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_layers_with_mtp, batch_size, max_length, config.latent_dim)
        self.slots = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._rows_B1 = torch.arange(batch_size, device=device)[:, None]

    @property
    def max_length(self) -> int:
        return self.slots.shape[2]

    def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
        if num_slots > self.max_length:
            raise ValueError(f"position {num_slots - 1} doesn't fit into a cache of max_length {self.max_length}")
        layer_BSC = self.slots[layer_index]
        # Detached: the buffer outlives the call, and would keep every call's graph alive where gradients are on.
        layer_BSC[self._rows_B1, positions_BT] = latent_BTC.detach().to(layer_BSC.dtype)
        return layer_BSC[:, :num_slots]

    def advance(self, num_tokens_B: Tensor | int) -> None:
        """Count the tokens of the last call as held; without padding that is its T."""
        self.lengths = self.lengths + num_tokens_B
