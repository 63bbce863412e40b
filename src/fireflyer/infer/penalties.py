"""What a row's own tokens do to its logits: presence, frequency and repetition penalties as OpenAI and vLLM define
them. In: the distinct tokens of each row with their counts. Out: logits, changed at these tokens alone.

Shapes: R rows, V vocabulary, N the distinct tokens of all rows, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fireflyer.infer.sampling_params import SamplingParams

_FIRST_ROOM = 256


class TokenCounts:
    """The distinct tokens of one request in the order they came, and how often each stands in the answer.

    Tokens that only the prompt has count 0. Adding a token costs the same however many there are.
    """

    def __init__(self, prompt_token_ids: Sequence[int] = ()) -> None:
        distinct = list(dict.fromkeys(prompt_token_ids))
        self._place = {token: place for place, token in enumerate(distinct)}
        room = max(2 * len(distinct), _FIRST_ROOM)
        self._tokens = np.zeros(room, dtype=np.int64)
        self._tokens[: len(distinct)] = distinct
        self._counts = np.zeros(room, dtype=np.float32)

    def add(self, token_id: int) -> None:
        place = self._place.setdefault(token_id, len(self._place))
        if place == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._tokens[place] = token_id
        self._counts[place] += 1

    def with_extra(self, extra_tokens: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(tokens, counts) as if `extra_tokens` had been added; nothing is added."""
        size = len(self._place)
        tokens, counts = self._tokens[:size], self._counts[:size]
        if not extra_tokens:
            return tokens, counts
        new = [token for token in dict.fromkeys(extra_tokens) if token not in self._place]
        tokens = np.concatenate((tokens, np.array(new, dtype=np.int64)))
        counts = np.concatenate((counts, np.zeros(len(new), dtype=np.float32)))
        for token in extra_tokens:
            counts[self._place[token] if token in self._place else size + new.index(token)] += 1
        return tokens, counts


class PenaltyRow(NamedTuple):
    """Row `row` of the logits and what is to be known of it."""

    row: int
    params: SamplingParams
    tokens: NDArray[np.int64]
    counts: NDArray[np.float32]


def penalize_(logits_RV: Tensor, rows: Sequence[PenaltyRow]) -> None:
    """Change fp32 logits in place: repetition first, then frequency and presence, in vLLM's order."""
    sizes = [len(row.tokens) for row in rows]

    def spread(values: Sequence[float], dtype: type) -> NDArray:
        return np.repeat(np.array(values, dtype=dtype), sizes)

    device = logits_RV.device
    row_N = torch.from_numpy(spread([row.row for row in rows], np.int64)).to(device)
    token_N = torch.from_numpy(np.concatenate([row.tokens for row in rows])).to(device)
    count_N = np.concatenate([row.counts for row in rows])
    off_N = count_N * spread([row.params.frequency_penalty for row in rows], np.float32)
    off_N += (count_N > 0) * spread([row.params.presence_penalty for row in rows], np.float32)
    repetition_N = torch.from_numpy(spread([row.params.repetition_penalty for row in rows], np.float32)).to(device)

    logit_N = logits_RV[row_N, token_N]
    logit_N = torch.where(logit_N > 0, logit_N / repetition_N, logit_N * repetition_N)
    logits_RV[row_N, token_N] = logit_N - torch.from_numpy(off_N).to(device)
