"""Log-probabilities beside tokens, in the shape vLLM's users know. In: logits as the model gave them and the token
that was chosen at each row. Out: for each row, {token id: Logprob}: the chosen one, then the most probable ones.

They are those of the model itself (vLLM's `raw_logprobs`): a softmax over its whole vocabulary, before temperature,
penalties, biases, filters and grammars. Shapes: R rows, V tokens that may be sampled, M the model's whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fireflyer.text.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for everything below it, -inf too, which JSON has no word for; vLLM's own bound."""

_ELEMENTS = 2**24
"""Numbers in one softmax: bounds what the log-probabilities of a long prompt need in memory."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """logprob: natural logarithm, LOWEST_LOGPROB at least. rank: 1 for the most probable token; of equally probable
    ones the lower id is first. decoded_token: how the token reads alone; "" without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str


def token_logprobs(
    logits_RM: Tensor,
    token_ids: Sequence[int],
    num_top: Sequence[int],
    vocab_size: int,
    tokenizer: Tokenizer | None,
) -> list[dict[int, Logprob]]:
    """One dictionary a row: token_ids[row], then the num_top[row] (-1: all) most probable tokens below vocab_size.

    Ranks are among the tokens below vocab_size, for those are what a sampler may choose.
    """
    rows = max(_ELEMENTS // logits_RM.shape[-1], 1)
    answer = []
    for start in range(0, len(token_ids), rows):
        part = slice(start, start + rows)
        answer += _part(logits_RM[part], token_ids[part], num_top[part], vocab_size, tokenizer)
    return answer


def _part(
    logits_RM: Tensor,
    token_ids: Sequence[int],
    num_top: Sequence[int],
    vocab_size: int,
    tokenizer: Tokenizer | None,
) -> list[dict[int, Logprob]]:
    # log_softmax and not logsumexp: it goes row by row, so its bits do not depend on how many rows there are.
    logprobs_RM = logits_RM.log_softmax(-1, dtype=torch.float32)
    logprobs_RM = logprobs_RM.nan_to_num_(LOWEST_LOGPROB).clamp_(min=LOWEST_LOGPROB)
    logprobs_RV = logprobs_RM[:, :vocab_size]
    token_R1 = torch.tensor(token_ids, device=logits_RM.device)[:, None]
    own_R1 = logprobs_RM.gather(-1, token_R1)
    id_V = torch.arange(vocab_size, device=logits_RM.device)
    before_RV = (logprobs_RV > own_R1) | ((logprobs_RV == own_R1) & (id_V < token_R1))
    ranks = (before_RV.sum(-1) + 1).tolist()
    own = own_R1[:, 0].tolist()
    counts = [vocab_size if count < 0 else min(count, vocab_size) for count in num_top]
    top_ids, top_values = _largest(logprobs_RV, max(counts))

    def entry(value: float, rank: int, token_id: int) -> Logprob:
        return Logprob(value, rank, "" if tokenizer is None else tokenizer.token_text(token_id))

    answer = []
    for row, token_id in enumerate(token_ids):
        entries = {token_id: entry(own[row], ranks[row], token_id)}
        for place in range(counts[row]):
            top_id = top_ids[row][place]
            entries[top_id] = entry(top_values[row][place], place + 1, top_id)
        answer.append(entries)
    return answer


def _largest(values_RV: Tensor, count: int) -> tuple[list[list[int]], list[list[float]]]:
    """(ids, values) of the `count` largest of each row, falling; equal ones by rising id."""
    if count == 0:
        rows: list[list] = [[] for _ in values_RV]
        return rows, rows
    # topk orders equal values as it likes, so the ones that tie with the last are found by value.
    threshold_R1 = values_RV.topk(count, dim=-1).values[:, -1:]
    ids, values = [], []
    for row_V, threshold in zip(values_RV, threshold_R1, strict=True):
        id_N = (row_V >= threshold).nonzero()[:, 0]
        value_N, order_N = row_V[id_N].sort(descending=True, stable=True)
        ids.append(id_N[order_N[:count]].tolist())
        values.append(value_N[:count].tolist())
    return ids, values
