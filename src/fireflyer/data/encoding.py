"""Documents in, their stretch of the token stream out: begin + tokens + end, with what counts as a label."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fireflyer.data.documents import Document
from fireflyer.data.packing import TokenStream
from fireflyer.errors import UserError
from fireflyer.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from fireflyer.text.tokenizer import Tokenizer

# Text encoded at a time: enough for the tokenizer to spread over the cores, little enough to hold.
CHUNK_CHARACTERS = 2**18
CHUNK_PARTS = 256


@dataclass(frozen=True)
class RawPart:
    """A part of a document, whether the document begins and ends with it, and for fill in the middle (prefix, middle,
    suffix), which then is the whole document."""

    document: Document
    begins: bool = True
    ends: bool = True
    middle_out: tuple[str, str, str] | None = None


class Encoder:
    """Turns parts of documents into tokens, many at a time."""

    def __init__(self, tokenizer: Tokenizer, fill_in_middle: bool = False) -> None:
        self._tokenizer = tokenizer
        self._fim_ids: tuple[int, ...] = ()
        if fill_in_middle:
            try:
                self._fim_ids = tuple(tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
            except UserError as error:
                raise UserError(f"data.fim_rate needs the fill-in-the-middle tokens; {error}") from error

    def encode(self, parts: Sequence[RawPart]) -> list[TokenStream]:
        """The tokens of each part."""
        texts = [text for part in parts for text in part.middle_out or (part.document.text,)]
        firsts = [0] * len(texts)
        if any(part.document.loss_from for part in parts):
            loss_from = [part.document.loss_from for part in parts for _ in part.middle_out or (0,)]
            pairs = self._tokenizer.encode_batch_from(texts, loss_from)
            encoded, firsts = [ids for ids, _ in pairs], [first for _, first in pairs]
        else:
            encoded = self._tokenizer.encode_batch(texts)
        streams = []
        taken = 0
        for part in parts:
            if part.middle_out:
                prefix, middle, suffix = encoded[taken : taken + 3]
                streams.append(self._stream(part, self._middle_out(prefix, middle, suffix), 0))
                taken += 3
            else:
                streams.append(self._stream(part, encoded[taken], firsts[taken]))
                taken += 1
        return streams

    def _middle_out(self, prefix: list[int], middle: list[int], suffix: list[int]) -> list[int]:
        begin, hole, end = self._fim_ids
        return [begin, *prefix, hole, *suffix, end, *middle]

    def _stream(self, part: RawPart, ids: list[int], first: int) -> TokenStream:
        before = [self._tokenizer.bos_id] * part.begins
        after = [self._tokenizer.eos_id] * part.ends
        tokens = np.array(before + ids + after, dtype=np.int32)
        counts = np.ones(len(tokens), dtype=bool)
        if part.document.loss_from:
            counts[: len(before) + first] = False
        begins = np.zeros(len(tokens), dtype=bool)
        begins[0] = part.begins
        return TokenStream(tokens, counts, begins)


def whole_document(parts: Iterator[Document]) -> Iterator[RawPart]:
    """The parts of one document (at least one), marked where it begins and ends."""
    part, begins = next(parts), True
    for following in parts:
        yield RawPart(part, begins=begins, ends=False)
        part, begins = following, False
    yield RawPart(part, begins=begins, ends=True)


def encode_all(encoder: Encoder, parts: Iterable[RawPart]) -> Iterator[TokenStream]:
    """The tokens of parts that need not fit into memory together."""
    chunk: list[RawPart] = []
    characters = 0
    for part in parts:
        chunk.append(part)
        characters += len(part.document.text)
        if characters >= CHUNK_CHARACTERS or len(chunk) == CHUNK_PARTS:
            yield from encoder.encode(chunk)
            chunk, characters = [], 0
    if chunk:
        yield from encoder.encode(chunk)
