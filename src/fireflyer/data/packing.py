"""A stream of tokens in, rows for the model out.

Documents follow each other in rows without a gap (DeepSeek-V3 report, section 4.1). Rows overlap by one token: the last
label of one is the first input of the next, so that every token is a label once.
"""

from dataclasses import dataclass

import numpy as np
import torch

NO_LABEL = -100  # what cross_entropy ignores


@dataclass(frozen=True)
class Batch:
    """Rows for the model; every tensor is int64 of shape (B, T).

    labels_BT is the next token, or -100 where no loss is taken. positions_BT runs along the row, or along each document
    in it when documents are masked from each other; document_ids_BT counts the documents of a row from 0.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    document_ids_BT: torch.Tensor


@dataclass
class TokenStream:
    """Packed documents: tokens (int32), whether each counts as a label, whether a document begins with it."""

    tokens: np.ndarray
    counts: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, stretch: slice) -> "TokenStream":
        return TokenStream(self.tokens[stretch], self.counts[stretch], self.begins[stretch])

    @classmethod
    def join(cls, streams: "list[TokenStream]") -> "TokenStream":
        return cls(
            np.concatenate([stream.tokens for stream in streams]),
            np.concatenate([stream.counts for stream in streams]),
            np.concatenate([stream.begins for stream in streams]),
        )


def pack_rows(stream: TokenStream, seq_len: int, mask_documents: bool, first_row: int = 0, row_step: int = 1) -> Batch:
    """Cut a stream of n * seq_len + 1 tokens into n rows; take every `row_step`-th of them from `first_row` on."""

    def rows(values: np.ndarray) -> np.ndarray:
        windows = np.lib.stride_tricks.sliding_window_view(values, seq_len + 1)
        return windows[::seq_len][first_row::row_step]

    tokens, counts, begins = rows(stream.tokens).astype(np.int64), rows(stream.counts), rows(stream.begins)
    if mask_documents:
        counts = counts & ~begins
    place = np.broadcast_to(np.arange(seq_len), (len(tokens), seq_len))
    positions = place
    if mask_documents:
        positions = place - np.maximum.accumulate(np.where(begins[:, :-1], place, 0), axis=1)
    document_ids = np.cumsum(begins[:, :-1], axis=1) - begins[:, :1]
    labels = np.where(counts[:, 1:], tokens[:, 1:], NO_LABEL)
    return Batch(
        *(torch.from_numpy(np.array(part, order="C")) for part in (tokens[:, :-1], labels, positions, document_ids))
    )
