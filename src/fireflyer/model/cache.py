"""What decoding remembers: per layer and token the normalised latent and the rotated rope key, C = L + R numbers.

The decoder speaks to a cache through `LatentCache` alone; `ContiguousCache` is the plain one. Slot j of a sequence holds
its position j, and a query sees the slots up to its own position. So right padding is harmless: a padded slot lies
beyond every real query until a real token overwrites it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fireflyer.config import ModelConfig


class LatentCache(Protocol):
    """What the decoder asks of a cache."""

    lengths: Tensor
    """(B,) int64: tokens held by each sequence; where the next call's tokens go unless it names positions."""

    def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
        """Store `latent_BTC` at `positions_BT`; return the first `num_slots` slots, (B, S, C)."""
        ...


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
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        width = config.kv_lora_rank + config.qk_rope_head_dim
        self.slots = torch.zeros(num_layers, batch_size, max_length, width, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._rows_B1 = torch.arange(batch_size, device=device)[:, None]

    @property
    def max_length(self) -> int:
        return self.slots.shape[2]

    def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
        layer_BSC = self.slots[layer_index]
        layer_BSC[self._rows_B1, positions_BT] = latent_BTC.to(layer_BSC.dtype)
        return layer_BSC[:, :num_slots]

    def advance(self, num_tokens_B: Tensor | int) -> None:
        """Count the tokens of the last call as held; without padding that is its T."""
        self.lengths = self.lengths + num_tokens_B

    def select(self, rows: Tensor) -> None:
        """Keep only the sequences `rows`, (B',) int64, in that order."""
        self.slots = self.slots[:, rows]
        self.lengths = self.lengths[rows]
        self._rows_B1 = torch.arange(len(rows), device=self.lengths.device)[:, None]
