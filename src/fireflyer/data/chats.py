"""Chats and prompt/completion pairs from JSONL files as token ids, packed into rows that keep them apart.

In: files whose lines have `messages` (OpenAI's form) or `prompt` and `completion`. Out: sequences with the tokens that
are learnt, all checked against the checkpoint's template and the row's length; rows in which as many sequences lie as
fit (best fit, longest first), each a document of its own; a loader over them that goes on exactly where it was saved.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fireflyer.data.draws import permutation
from fireflyer.data.held_out import HeldOutRows
from fireflyer.data.jsonl import Line, check_keys, read_lines
from fireflyer.data.packing import NO_LABEL, Batch
from fireflyer.errors import UserError
from fireflyer.text.taught import Taught, taught_chat, taught_text
from fireflyer.text.tokenizer import Tokenizer

PADDING = -1
"""The document number of what fills a row up."""

_EXTRAS = frozenset({"id", "metadata"})
_CHAT_KEYS = frozenset({"messages", "tools", "chat_template_kwargs", "parallel_tool_calls"}) | _EXTRAS
_PAIR_KEYS = frozenset({"prompt", "completion", "tools", "chat_template_kwargs"}) | _EXTRAS


@dataclass(frozen=True)
class Chats:
    """Sequences of each line, and what tells whether the files are still the same."""

    lines: list[list[Taught]]
    fingerprint: list[str]


def read_chats(paths: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> Chats:
    """All lines of the files. Raises UserError with file, line and reason."""
    lines: list[list[Taught]] = []
    fingerprint: list[str] = []
    for path in paths:
        digest, found = read_lines(path)
        fingerprint.append(digest)
        for line in found:
            try:
                sequences = taught_line(line, tokenizer)
            except UserError as error:
                raise UserError(error_at(line, error)) from None
            lines.append(check_lengths(line, sequences, seq_len))
    return Chats(lines, fingerprint)


def taught_line(line: Line, tokenizer: Tokenizer) -> list[Taught]:
    """The sequences of one line. Raises UserError."""
    values = line.values
    if "messages" in values:
        check_keys(line, _CHAT_KEYS)
        return taught_chat(tokenizer, values["messages"], values.get("tools"), template_variables(line))
    check_keys(line, _PAIR_KEYS if "prompt" in values else _CHAT_KEYS | _PAIR_KEYS)
    prompt, completion = values.get("prompt"), values.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise UserError(f"{line.where}: completion is empty; nothing is left to learn")
        return [taught_text(tokenizer, prompt, completion)]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = [{**m, "weight": 0} if isinstance(m, dict) and m.get("role") == "assistant" else m for m in prompt]
        return taught_chat(tokenizer, [*context, *completion], values.get("tools"), template_variables(line))
    raise UserError(f"{line.where}: give messages, or prompt and completion (two texts, or two lists of messages)")


def template_variables(line: Line) -> Mapping[str, Any]:
    """The template's own switches that a line sets."""
    variables = line.values.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise UserError(f"{line.where}: chat_template_kwargs must be an object, got {variables!r:.60}")
    return variables


def error_at(line: Line, error: UserError) -> str:
    """The error's text with the place, unless it has it already."""
    text = str(error)
    return text if text.startswith(line.where) else f"{line.where}: {text}"


def check_lengths(line: Line, sequences: list[Taught], seq_len: int) -> list[Taught]:
    """Refuse a sequence that no row can hold."""
    for taught in sequences:
        if len(taught.token_ids) > seq_len + 1:
            raise UserError(
                f"{line.where}: {len(taught.token_ids)} tokens, of which a row holds seq_len = {seq_len} and the one"
                " after; raise it with --set seq_len=N, or leave this line out"
            )
    return sequences


def split_lines(chats: Chats, share: float, seed: int) -> tuple[list[Taught], list[Taught]]:
    """(to train on, held out): whole lines, at least one of them held out where `share` is above 0."""
    count = len(chats.lines)
    held = min(max(1, round(count * share)), count) if share else 0
    chosen = set(permutation(count, seed, "held-out chats")[:held].tolist())
    train = [taught for i, line in enumerate(chats.lines) if i not in chosen for taught in line]
    return train, [taught for i in sorted(chosen) for taught in chats.lines[i]]


def best_fit(lengths: Sequence[int], capacity: int, order: Sequence[int]) -> list[list[int]]:
    """Bins of at most `capacity`: longest first, each into the bin where the least room is left after it.

    `order` decides among equal lengths; how many bins there are doesn't depend on it.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), sorted
    for item in sorted(order, key=lambda i: -lengths[i]):
        place = bisect_left(room, (lengths[item], -1))
        if place == len(room):
            bins.append([item])
            left, number = capacity - lengths[item], len(bins) - 1
        else:
            left, number = room.pop(place)
            bins[number].append(item)
            left -= lengths[item]
        insort(room, (left, number))
    return bins


def packed_rows(rows: Sequence[Sequence[Taught]], seq_len: int, pad_id: int) -> Batch:
    """Each row's sequences side by side, as documents with positions of their own; what is left is padding."""
    shape = (len(rows), seq_len)
    ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, NO_LABEL, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.full(shape, PADDING, dtype=np.int64)
    for row, sequences in enumerate(rows):
        start = 0
        for document, taught in enumerate(sequences):
            tokens, trained = np.array(taught.token_ids), np.array(taught.trained)
            stop = start + len(tokens) - 1
            ids[row, start:stop] = tokens[:-1]
            labels[row, start:stop] = np.where(trained[1:], tokens[1:], NO_LABEL)
            positions[row, start:stop] = np.arange(stop - start)
            documents[row, start:stop] = document
            start = stop
        positions[row, start:] = np.arange(seq_len - start)
    return Batch(*(torch.from_numpy(part) for part in (ids, labels, positions, documents)))


def pad_token(tokenizer: Tokenizer) -> int:
    """What fills a row up: never a label, so that the end token may stand in where a vocabulary has no pad token."""
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


class ChatLoader:
    """Rows of packed sequences, every epoch packed and ordered anew."""

    def __init__(self, sequences: Sequence[Taught], fingerprint: list[str], *, seq_len: int, seed: int, pad_id: int):
        self._sequences, self._fingerprint = sequences, fingerprint
        self._lengths = [len(taught.token_ids) - 1 for taught in sequences]
        self._seq_len, self._seed, self._pad_id = seq_len, seed, pad_id
        self._epoch = self._place = 0
        self._rows = self._rows_of(0)

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self._rows)

    @property
    def epoch(self) -> int:
        """Of the row taken last, or to be taken first."""
        return self._epoch

    def next_batch(self, batch_size: int) -> Batch:
        taken: list[list[int]] = []
        for _ in range(batch_size):
            if self._place == len(self._rows):
                self._epoch, self._place = self._epoch + 1, 0
                self._rows = self._rows_of(self._epoch)
            taken.append(self._rows[self._place])
            self._place += 1
        rows = [[self._sequences[i] for i in row] for row in taken]
        return packed_rows(rows, self._seq_len, self._pad_id)

    def state_dict(self) -> dict[str, Any]:
        return {"data": self._fingerprint, "seed": self._seed, "epoch": self._epoch, "place": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["data"] != self._fingerprint:
            raise UserError("the data changed since this run was saved; put it back, or begin another run")
        self._epoch, self._place = state["epoch"], state["place"]
        self._rows = self._rows_of(self._epoch)

    def _rows_of(self, epoch: int) -> list[list[int]]:
        order = permutation(len(self._sequences), self._seed, "chats", epoch).tolist()
        rows = best_fit(self._lengths, self._seq_len, order)
        return [rows[i] for i in permutation(len(rows), self._seed, "rows", epoch).tolist()]


def held_out_chats(
    sequences: Sequence[Taught], tokenizer: Tokenizer, seq_len: int, max_rows: int, batch_size: int
) -> HeldOutRows:
    """Up to `max_rows` rows of held-out sequences; the bytes are those of the text that is learnt."""
    lengths = [len(taught.token_ids) - 1 for taught in sequences]
    packed = best_fit(lengths, seq_len, range(len(sequences)))[:max_rows]
    rows = [[sequences[i] for i in row] for row in packed]
    batches = [
        packed_rows(rows[start : start + batch_size], seq_len, pad_token(tokenizer))
        for start in range(0, len(rows), batch_size)
    ]
    bytes_of = np.array(tokenizer.byte_lengths())
    labels = np.concatenate([batch.labels_BT.numpy().ravel() for batch in batches])
    labels = labels[labels != NO_LABEL]
    return HeldOutRows(tuple(batches), len(labels), max(1, int(bytes_of[labels].sum())))
