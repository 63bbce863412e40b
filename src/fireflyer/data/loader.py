"""A mixture and a tokenizer in, batches out: the same ones however often the run is stopped, on however many ranks.

The whole of a loader's state is where the next document is in each source, how many tokens each source has given, and
how much of the current document has been used; what else it holds is encoded again from there.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fireflyer.data.encoding import CHUNK_CHARACTERS, CHUNK_PARTS, Encoder, RawPart
from fireflyer.data.fim import split_middle
from fireflyer.data.mixture import Mixture
from fireflyer.data.packing import Batch, TokenStream, pack_rows
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer

# Where a part is: (epoch, place in that epoch's order, part of the document there). The place after an epoch's last
# document and the first place of the next epoch mean the same.
Cursor = tuple[int, int, int]


class Loader:
    """Packed rows from a mixture.

    Each document is begin + tokens + end; the stream of them is cut into rows of seq_len tokens, every token being a
    label once. The next document comes from the source with the fewest tokens for its weight. The stream of rows does
    not depend on batch sizes or ranks: a rank takes rows rank, rank + world_size, ... of each global batch.
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        seed: int,
        fim_rate: float = 0.0,
        mask_documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for source in mixture.sources:
            if source.num_documents == 0:
                raise UserError(f"{source.name}: all of it is held out, none is left to train on; lower data.held_out")
        self._mixture = mixture
        self._seq_len = seq_len
        self._seed = seed
        self._mask_documents = mask_documents
        self._rank = rank
        self._world_size = world_size
        encoder = Encoder(tokenizer, fill_in_middle=fim_rate > 0)
        self._feeds = [_Feed(mixture, source, encoder, fim_rate, seed) for source in range(len(mixture.sources))]
        self._tokens = [0] * len(self._feeds)
        self._current: _Piece | None = None
        self._source = 0  # of the current piece
        self._buffer: list[TokenStream] = []
        self._buffered = 0

    @property
    def epoch(self) -> int:
        """The pass over the data that the latest token belongs to, from 0; in a mixture the furthest source's."""
        return max(feed.epoch for feed in self._feeds)

    def next_batch(self, batch_size: int) -> Batch:
        """The next `batch_size` rows of the stream, of which this rank gets its share."""
        if batch_size % self._world_size:
            raise UserError(f"batch_size {batch_size} doesn't divide among {self._world_size} ranks")
        length = batch_size * self._seq_len
        while self._buffered < length + 1:
            self._take_piece()
        stream = TokenStream.join(self._buffer)
        # The last token is the next batch's first input, so what stays is of the current piece alone.
        self._buffer = [stream[length:]]
        self._buffered -= length
        return pack_rows(stream[: length + 1], self._seq_len, self._mask_documents, self._rank, self._world_size)

    def state_dict(self) -> dict[str, Any]:
        """A few numbers a source, JSON-able. Valid for any rank and world size."""
        cursors = [list(feed.cursor) for feed in self._feeds]
        current = None
        if self._current:
            cursors[self._source] = list(self._current.cursor)
            current = [self._source, len(self._current.stream) - self._buffered]
        return {
            "seed": self._seed,
            "data": self._mixture.fingerprint(),
            "cursors": cursors,
            "tokens": list(self._tokens),
            "current": current,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken. Raises UserError if the data is no longer what it was."""
        now = self._mixture.fingerprint()
        if len(state["data"]) != len(now) or state["seed"] != self._seed:
            raise UserError("this run was saved with other data sources or another seed; begin another run")
        for name, before, after in zip(self._mixture.names, state["data"], now, strict=True):
            if before != after:
                raise UserError(f"{name}: the text changed since this run was saved; put it back or begin another run")
        for feed, (epoch, place, part) in zip(self._feeds, state["cursors"], strict=True):
            feed.seek((epoch, place, part))
        self._tokens = list(state["tokens"])
        self._current = None
        self._buffer, self._buffered = [], 0
        if state["current"]:
            self._source, used = state["current"]
            piece = self._feeds[self._source].take()
            self._current = piece
            self._buffer = [piece.stream[used:]]
            self._buffered = len(self._buffer[0])

    def _take_piece(self) -> None:
        if self._current is None or self._current.ends:
            shares = [tokens / weight for tokens, weight in zip(self._tokens, self._mixture.weights, strict=True)]
            self._source = shares.index(min(shares))
        piece = self._feeds[self._source].take()
        self._current = piece
        self._tokens[self._source] += len(piece.stream)
        self._buffer.append(piece.stream)
        self._buffered += len(piece.stream)


@dataclass(frozen=True)
class _Piece:
    """One encoded part of a document: where it was, its tokens, and whether the document ends with it."""

    cursor: Cursor
    stream: TokenStream
    ends: bool


class _Feed:
    """The encoded parts of one source, in order, epoch after epoch. They are encoded some way ahead, many at a time."""

    def __init__(self, mixture: Mixture, source: int, encoder: Encoder, fim_rate: float, seed: int) -> None:
        self._mixture = mixture
        self._number = source
        self._source = mixture.sources[source]
        self._encoder = encoder
        self._fim_rate = fim_rate
        self._seed = seed
        self._order_epoch = -1
        self._order: Sequence[int] | np.ndarray = ()
        self.seek((0, 0, 0))

    @property
    def epoch(self) -> int:
        """Of the piece taken last, or to be taken first."""
        return self.cursor[0]

    def seek(self, cursor: Cursor) -> None:
        """Make the part at a cursor the next that take() gives."""
        self.cursor = cursor
        self._ahead = cursor
        self._pieces: deque[_Piece] = deque()

    def take(self) -> _Piece:
        if not self._pieces:
            self._encode_ahead()
        piece = self._pieces.popleft()
        self.cursor = _after(piece.cursor, piece.ends)
        return piece

    def _encode_ahead(self) -> None:
        cursors: list[Cursor] = []
        parts: list[RawPart] = []
        characters = 0
        while characters < CHUNK_CHARACTERS and len(parts) < CHUNK_PARTS:
            cursor, part = self._read(self._ahead)
            cursors.append(cursor)
            parts.append(part)
            characters += len(part.document.text)
            self._ahead = _after(cursor, part.ends)
        streams = self._encoder.encode(parts)
        self._pieces.extend(_Piece(*piece) for piece in zip(cursors, streams, (p.ends for p in parts), strict=True))

    def _read(self, cursor: Cursor) -> tuple[Cursor, RawPart]:
        """The part at a cursor; past the end of an epoch, the first of the next one."""
        epoch, place, number = cursor
        order = self._order_of(epoch)
        if place == len(order):
            epoch, place = epoch + 1, 0
            order = self._order_of(epoch)
        index = int(order[place])
        num_parts = self._source.num_parts(index)
        document = self._source.read(index, number)
        middle_out = None
        # A text too long to be read at once has no context that would hold its suffix.
        if self._fim_rate and num_parts == 1 and not document.loss_from:
            middle_out = split_middle(document.text, self._fim_rate, self._seed, self._number, epoch, index)
        part = RawPart(document, begins=number == 0, ends=number == num_parts - 1, middle_out=middle_out)
        return (epoch, place, number), part

    def _order_of(self, epoch: int) -> Sequence[int] | np.ndarray:
        if self._order_epoch != epoch:
            self._order = self._mixture.order(self._number, self._seed, epoch)
            self._order_epoch = epoch
        return self._order


def _after(cursor: Cursor, ends: bool) -> Cursor:
    epoch, place, number = cursor
    return (epoch, place + 1, 0) if ends else (epoch, place, number + 1)
