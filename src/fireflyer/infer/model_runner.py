"""The decoder over the rows of one cache. In: token ids and their positions. Out: the logits of each row's last token.

Rows 0 to n-1 are in use, without gaps, so that a decode step works on a plain slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fireflyer.model.cache import ContiguousCache
from fireflyer.model.decoder import Decoder

PREFILL_TOKENS = 4096
"""Tokens, padding included, of one call of the decoder: bounds what prefill needs beside the weights and the cache."""


class ModelRunner:
    """A decoder with the latents of up to `num_rows` sequences. `num_slots` is a start: the rows grow as they fill."""

    def __init__(self, model: Decoder, num_rows: int, num_slots: int) -> None:
        weight = model.head_weight
        self.device, self._dtype = weight.device, weight.dtype
        self._model = model
        self._cache = ContiguousCache(model.config, num_rows, num_slots, weight.dtype, weight.device)
        self._window = self._cache.rows(0, 0)

    @torch.inference_mode()
    def prefill(self, first_row: int, prompts: list[list[int]]) -> Tensor:
        """Read prompts into the rows from `first_row` on; (B, V) logits after each prompt's last token.

        Shorter prompts are padded on the right: what stands there is overwritten before any query sees it.
        """
        lengths = [len(prompt) for prompt in prompts]
        self._reserve(max(lengths))
        rows = self._cache.rows(first_row, first_row + len(prompts))
        last_token_B = torch.tensor(lengths, device=self.device) - 1
        ids_BT = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_BT[row, : len(prompt)] = torch.tensor(prompt)
        ids_BT = ids_BT.to(self.device)
        positions_T = torch.arange(ids_BT.shape[1], device=self.device)
        last_BD = torch.empty(len(prompts), self._model.config.hidden_size, dtype=self._dtype, device=self.device)
        step = max(PREFILL_TOKENS // len(prompts), 1)
        for start in range(0, ids_BT.shape[1], step):
            chunk_BT = ids_BT[:, start : start + step]
            positions_BT = positions_T[start : start + step].expand_as(chunk_BT)
            hidden_BTD = self._model.trunk(chunk_BT, positions=positions_BT, cache=rows).hidden_BTD
            ends_here_B = (last_token_B >= start) & (last_token_B < start + step)
            last_BD[ends_here_B] = hidden_BTD[ends_here_B, last_token_B[ends_here_B] - start]
        return self._model.head(last_BD)

    @torch.inference_mode()
    def decode(self, token_ids: list[int], positions: list[int]) -> Tensor:
        """One token for each of the first len(token_ids) rows, at its position; (B, V) logits."""
        self._reserve(max(positions) + 1)
        if self._window.slots.shape[1] != len(token_ids):
            self._window = self._cache.rows(0, len(token_ids))
        ids_B1, positions_B1 = torch.tensor([token_ids, positions], device=self.device)[..., None]
        hidden_B1D = self._model.trunk(ids_B1, positions=positions_B1, cache=self._window).hidden_BTD
        return self._model.head(hidden_B1D[:, 0])

    @torch.inference_mode()
    def move_row(self, source: int, target: int) -> None:
        """Put the last row in the place of one that has ended."""
        self._cache.move_row(source, target)

    def _reserve(self, num_slots: int) -> None:
        if num_slots > self._cache.max_length:
            self._cache.grow(max(num_slots, 2 * self._cache.max_length))
            self._window = self._cache.rows(0, 0)
