"""Pairs of answers, of which the first is preferred, from JSONL files; each pair is one row of two documents.

In: lines of `prompt`, `chosen`, `rejected`: three texts, or messages (the prompt may then lie in chosen and rejected).
Out: sequences with the answers' tokens marked, checked; and a loader over the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fireflyer.data.chats import PADDING, error_at, packed_rows, template_variables
from fireflyer.data.draws import permutation
from fireflyer.data.jsonl import Line, check_keys, read_lines
from fireflyer.data.packing import Batch
from fireflyer.errors import UserError
from fireflyer.text.taught import Taught, taught_chat, taught_text
from fireflyer.text.tokenizer import Tokenizer

_KEYS = frozenset({"prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "id", "metadata"})


@dataclass(frozen=True)
class Pair:
    chosen: Taught
    rejected: Taught

    @property
    def num_inputs(self) -> int:
        """Positions that the two take in a row."""
        return len(self.chosen.token_ids) + len(self.rejected.token_ids) - 2


@dataclass(frozen=True)
class PairBatch:
    """`rows`: a pair a row, the chosen answer document 0, the rejected one 1. `indices`: the pairs' numbers."""

    rows: Batch
    indices: list[int]


def read_pairs(paths: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> tuple[list[Pair], list[str]]:
    """All pairs, and the files' hashes. Raises UserError with file, line and reason."""
    pairs: list[Pair] = []
    fingerprint: list[str] = []
    for path in paths:
        digest, lines = read_lines(path)
        fingerprint.append(digest)
        for line in lines:
            check_keys(line, _KEYS)
            try:
                pair = Pair(_answer(line, "chosen", tokenizer), _answer(line, "rejected", tokenizer))
            except UserError as error:
                raise UserError(error_at(line, error)) from None
            pairs.append(_checked(line, pair, seq_len))
    return pairs, fingerprint


def _answer(line: Line, key: str, tokenizer: Tokenizer) -> Taught:
    prompt, answer = line.values.get("prompt"), line.values.get(key)
    if isinstance(prompt, str) and isinstance(answer, str):
        return taught_text(tokenizer, prompt, answer)
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    if not isinstance(answer, list) or not answer or not isinstance(prompt, (list, type(None))):
        raise UserError(f"{key} must be a text after a prompt of text, or messages; got {answer!r:.60}")
    chat = [*(prompt or []), *answer]
    context = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in chat[:-1]]
    try:
        variables = template_variables(line)
        return taught_chat(tokenizer, [*context, chat[-1]], line.values.get("tools"), variables)[-1]
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _checked(line: Line, pair: Pair, seq_len: int) -> Pair:
    if pair.num_inputs > seq_len:
        raise UserError(
            f"{line.where}: both answers with their prompt come to {pair.num_inputs} tokens, more than a row of"
            f" seq_len = {seq_len}; raise it with --set seq_len=N, or leave this line out"
        )
    if pair.chosen == pair.rejected:
        raise UserError(f"{line.where}: chosen and rejected are the same; leave this line out")
    return pair


def pair_rows(pairs: Sequence[Pair], indices: Sequence[int], seq_len: int, pad_id: int) -> PairBatch:
    """The rows of these pairs."""
    rows = packed_rows([[pairs[i].chosen, pairs[i].rejected] for i in indices], seq_len, pad_id)
    return PairBatch(rows, list(indices))


def trimmed(rows: Batch) -> Batch:
    """Without the columns that are padding in every row."""
    text = (rows.document_ids_BT != PADDING).any(0).nonzero()
    end = int(text[-1]) + 1
    parts: list[Tensor] = [rows.input_ids_BT, rows.labels_BT, rows.positions_BT, rows.document_ids_BT]
    return Batch(*(part[:, :end] for part in parts))


class PairLoader:
    """Pairs, every epoch in another order; their numbers are those of `pairs`."""

    def __init__(self, pairs: Sequence[Pair], fingerprint: list[str], *, seq_len: int, seed: int, pad_id: int) -> None:
        self._pairs, self._fingerprint = pairs, fingerprint
        self._seq_len, self._seed, self._pad_id = seq_len, seed, pad_id
        self._taken = 0

    @property
    def epoch(self) -> int:
        """Of the pair taken last."""
        return max(self._taken - 1, 0) // len(self._pairs)

    def next_batch(self, batch_size: int) -> PairBatch:
        indices = []
        for number in range(self._taken, self._taken + batch_size):
            epoch, place = divmod(number, len(self._pairs))
            indices.append(int(permutation(len(self._pairs), self._seed, "pairs", epoch)[place]))
        self._taken += batch_size
        return pair_rows(self._pairs, indices, self._seq_len, self._pad_id)

    def state_dict(self) -> dict[str, Any]:
        return {"data": self._fingerprint, "seed": self._seed, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["data"] != self._fingerprint:
            raise UserError("the data changed since this run was saved; put it back, or begin another run")
        self._taken = state["taken"]


def split_pairs(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(to train on, held out), at least one held out where `share` is above 0."""
    held = min(max(1, round(len(pairs) * share)), len(pairs)) if share else 0
    chosen = set(permutation(len(pairs), seed, "held-out pairs")[:held].tolist())
    return [p for i, p in enumerate(pairs) if i not in chosen], [pairs[i] for i in sorted(chosen)]


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The rows on another device."""
    parts = (batch.input_ids_BT, batch.labels_BT, batch.positions_BT, batch.document_ids_BT)
    return Batch(*(part.to(device) for part in parts))
