"""The same evaluation rows every time, and how many bytes of text their labels stand for.

A loss per token can't be compared between tokenizers; bits per byte can.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fireflyer.data.documents import Source
from fireflyer.data.encoding import Encoder, encode_all, whole_document
from fireflyer.data.mixture import Mixture, interleave
from fireflyer.data.packing import NO_LABEL, Batch, TokenStream, pack_rows
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutRows:
    """Evaluation batches; all labels in them: how many, and the UTF-8 bytes of text they stand for."""

    batches: tuple[Batch, ...]
    num_labels: int
    num_bytes: int

    def bits_per_byte(self, total_nll: float) -> float:
        """From the negative log-likelihood (nats) of all labels summed."""
        return total_nll / math.log(2) / self.num_bytes


def held_out_rows(
    mixture: Mixture,
    tokenizer: Tokenizer,
    seq_len: int,
    max_rows: int,
    *,
    batch_size: int = 16,
    mask_documents: bool = False,
) -> HeldOutRows:
    """Up to `max_rows` packed rows of the text that `mixture` holds out, mixed by its weights.

    The last row is filled up with labels of -100. Raises UserError if nothing is held out.
    """
    found, wanted = 0, max_rows * seq_len + 1
    streams = [_encoded(source, tokenizer, wanted) for source in mixture.sources]
    parts: list[TokenStream] = []
    for stream in interleave(streams, mixture.weights, size=len):
        parts.append(stream)
        found += len(stream)
        if found >= wanted:
            break
    if not parts:
        raise UserError("no text is held out for evaluation: set data.held_out above 0 or name some in eval_data")
    rows = min(max_rows, max(1, math.ceil((found - 1) / seq_len)))
    filler = max(0, rows * seq_len + 1 - found)
    if filler:
        parts.append(_filler(tokenizer, filler))
    stream = TokenStream.join(parts)
    lengths = np.array(tokenizer.byte_lengths())
    batches: list[Batch] = []
    num_labels = num_bytes = 0
    for row in range(0, rows, batch_size):
        stretch = stream[row * seq_len : min(row + batch_size, rows) * seq_len + 1]
        batches.append(pack_rows(stretch, seq_len, mask_documents))
        labels = batches[-1].labels_BT.numpy()
        labels = labels[labels != NO_LABEL]
        num_labels += len(labels)
        num_bytes += int(lengths[labels].sum())
    return HeldOutRows(tuple(batches), num_labels, num_bytes)


def _encoded(source: Source, tokenizer: Tokenizer, at_most: int) -> Iterator[TokenStream]:
    """The held-out documents of one source, each as one stretch of tokens; one of a book's length is broken off."""
    encoder = Encoder(tokenizer)
    for parts in source.held_out_documents():
        streams: list[TokenStream] = []
        found = 0
        for stream in encode_all(encoder, whole_document(parts)):
            streams.append(stream)
            found += len(stream)
            if found >= at_most:
                break
        yield TokenStream.join(streams)


def _filler(tokenizer: Tokenizer, length: int) -> TokenStream:
    token = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    begins = np.zeros(length, dtype=bool)
    begins[0] = True
    return TokenStream(np.full(length, token, dtype=np.int32), np.zeros(length, dtype=bool), begins)
