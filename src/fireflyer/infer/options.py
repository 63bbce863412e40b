"""How an engine is set up. In: keyword arguments. Out: a frozen, checked `EngineOptions`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fireflyer.errors import UserError

CacheDtype = Literal["auto", "fp32", "bf16", "int8"]

_CACHE_DTYPES = ("auto", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class EngineOptions:
    """Settings of one engine. Raises UserError naming the setting, the value and its range.

    max_length: tokens of prompt and answer together at most; None: the model's max_position_embeddings.
    max_num_seqs: answers that are written at the same time; more wait for a free place.
    max_step_tokens: tokens that one step reads at most; longer prompts are read in pieces, beside others' decoding.
    block_size: cache slots that are given away together.
    cache_gib: memory for the cache; None: what max_num_seqs answers of max_length need, or two fifths of the memory
        that is free when the engine starts, whichever is less.
    cache_dtype: how latents are kept: as the model's own numbers ("auto"), fp32, bf16, or int8 with a scale a token.
    prefix_cache: keep the latents of prompts and answers that have ended, for requests that begin the same way.
    num_speculative_tokens: tokens that the MTP layers draft for each step of an answer; None: as many as the model has
        MTP layers; 0: off. Where more are asked for than there are layers, the last one goes on from its own drafts.
    deterministic: the same bits for a request alone, in any batch, with any chunks, with and without drafts.
    """

    max_length: int | None = None
    max_num_seqs: int = 64
    max_step_tokens: int = 2048
    block_size: int = 16
    cache_gib: float | None = None
    cache_dtype: CacheDtype = "auto"
    prefix_cache: bool = True
    num_speculative_tokens: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.max_length is not None:
            _at_least("max_length", self.max_length, 2)
        for name in ("max_num_seqs", "max_step_tokens", "block_size"):
            _at_least(name, getattr(self, name), 1)
        if self.num_speculative_tokens is not None:
            _at_least("num_speculative_tokens", self.num_speculative_tokens, 0)
        if self.cache_gib is not None and not (math.isfinite(self.cache_gib) and self.cache_gib > 0):
            raise UserError(f"cache_gib is {self.cache_gib!r}; it must be more than 0")
        if self.cache_dtype not in _CACHE_DTYPES:
            raise UserError(f"cache_dtype is {self.cache_dtype!r}; it must be one of {', '.join(_CACHE_DTYPES)}")


def _at_least(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{name} is {value!r}; it must be a whole number, at least {low}")
