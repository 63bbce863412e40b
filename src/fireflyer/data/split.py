"""Which text is held out for evaluation and never trained on.

A document is held out by the hash of its text, so the choice holds when files are renamed, moved, repeated or joined by
others. Where that picks nothing from a source (a few documents, one book) or most of it, its tail is held out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from fireflyer.data.documents import Document, FileDocuments
from fireflyer.errors import UserError

# The tail is at least this long: fewer bytes say little about a model.
_LEAST_TAIL_BYTES = 400


@dataclass
class Split:
    """One source's documents: `held_out` (bool for each), and `cuts`: documents trained on up to (part, byte of its
    UTF-8) and held out from there."""

    held_out: np.ndarray
    cuts: dict[int, tuple[int, int]] = field(default_factory=dict)


class FileSource:
    """Files of which some text is held out: a data.documents.Source."""

    def __init__(self, documents: FileDocuments, split: Split) -> None:
        self._documents = documents
        self._split = split
        self.name = documents.name
        self.num_documents = int((~split.held_out).sum())
        self.num_bytes = int(documents.document_bytes[~split.held_out].sum())

    def fingerprint(self) -> str:
        return self._documents.fingerprint()

    def order(self, *key: int | str) -> np.ndarray:
        order = self._documents.order(*key)
        return order[~self._split.held_out[order]]

    def num_parts(self, document: int) -> int:
        if document not in self._split.cuts:
            return self._documents.num_parts(document)
        part, byte = self._split.cuts[document]
        return part + (byte > 0)

    def read(self, document: int, part: int = 0) -> Document:
        """One part of a document, without the tail that is held out from it if any is."""
        whole = self._documents.read(document, part)
        cut_part, byte = self._split.cuts.get(document, (-1, 0))
        return Document(_bytes_of(whole, 0, byte)) if part == cut_part else whole

    def held_out_documents(self) -> Iterator[Iterator[Document]]:
        numbers = np.flatnonzero(self._split.held_out)
        for number in numbers[np.argsort(self._documents.hashes[numbers], kind="stable")]:
            yield self._rest(int(number), 0, 0)
        one_of_each = {self._documents.hashes[number]: number for number in self._split.cuts}
        for number in one_of_each.values():
            yield self._rest(number, *self._split.cuts[number])

    def _rest(self, document: int, part: int, byte: int) -> Iterator[Document]:
        yield Document(_bytes_of(self._documents.read(document, part), byte, None))
        for later in range(part + 1, self._documents.num_parts(document)):
            yield self._documents.read(document, later)


def split_by_hash(sources: Sequence[FileDocuments], share: float) -> list[Split]:
    """Hold out about `share` of the documents of every source, whatever is decided for a text being so for each of its
    copies in all of them. Raises UserError when there is too little text to be split."""
    if not 0 <= share <= 1:
        raise UserError(f"data.held_out must be a share from 0 to 1, got {share}")
    if share == 1:
        return [Split(np.ones(source.num_documents, dtype=bool)) for source in sources]
    chosen = [source.hashes < np.uint64(int(share * 2**64)) for source in sources]
    splits = [Split(mask) for mask in chosen]
    if share > 0 and sources:
        splitter = _Splitter(sources, splits, share)
        for number in range(len(sources)):
            splitter.give_back(number)
        for number in range(len(sources)):
            splitter.hold_out_tail(number)
        if not any(split.cuts or split.held_out.any() for split in splits):
            size = sum(source.num_bytes for source in sources)
            raise UserError(f"{sources[0].name}: {size} bytes of text are too little to hold some out for evaluation")
    return splits


class _Splitter:
    """Mends a split by hash that leaves a source with nothing held out, or with little to train on."""

    def __init__(self, sources: Sequence[FileDocuments], splits: list[Split], share: float) -> None:
        self._sources = sources
        self._splits = splits
        self._share = share
        self._sizes = [source.document_bytes for source in sources]

    def give_back(self, number: int) -> None:
        """While too much of a source is held out, hold out only the tail of its longest such document."""
        sizes, held = self._sizes[number], self._splits[number].held_out
        while sizes[held].sum() > (1 + self._share) / 2 * sizes.sum():
            longest = int(np.flatnonzero(held)[np.argmax(sizes[held])])
            self._cut(number, longest, self._wanted(int(sizes[longest])))

    def hold_out_tail(self, number: int) -> None:
        """If nothing of a source is held out: whole documents from its end as far as they fit, and the end of one."""
        split, sizes = self._splits[number], self._sizes[number]
        if split.cuts or split.held_out.any():
            return
        wanted = self._wanted(int(sizes.sum()))
        tried: set[int] = set()
        for document in reversed(range(len(sizes))):
            text_hash = int(self._sources[number].hashes[document])
            if wanted == 0:
                return
            if text_hash in tried:
                continue
            tried.add(text_hash)
            copies = self._copies(number, document)
            if sizes[document] * len(copies[number]) <= wanted and self._can_spare(copies):
                for one, twins in zip(self._splits, copies, strict=True):
                    one.held_out[twins] = True
                wanted -= int(sizes[document]) * len(copies[number])
            elif self._cut(number, document, wanted):
                return

    def _wanted(self, size: int) -> int:
        return int(min(max(self._share * size, _LEAST_TAIL_BYTES), max(self._share, 0.25) * size))

    def _copies(self, number: int, document: int) -> list[np.ndarray]:
        """The documents of the same text, for each source."""
        text_hash = self._sources[number].hashes[document]
        return [np.flatnonzero(source.hashes == text_hash) for source in self._sources]

    def _can_spare(self, copies: list[np.ndarray]) -> bool:
        """Whether every source keeps half of its text if these go."""
        for split, sizes, twins in zip(self._splits, self._sizes, copies, strict=True):
            if sizes[~split.held_out].sum() - sizes[twins].sum() < sizes.sum() / 2:
                return False
        return True

    def _cut(self, number: int, document: int, tail: int) -> bool:
        """Train on a text but for its last `tail` bytes or a few more; on all of it if it is too short (False)."""
        tail = _to_character(self._sources[number], document, min(tail, int(self._sizes[number][document]) // 2))
        for source, split, twins in zip(self._sources, self._splits, self._copies(number, document), strict=True):
            split.held_out[twins] = False
            if tail:
                split.cuts |= {int(twin): _place(source, int(twin), tail) for twin in twins}
        return tail > 0


def _bytes_of(document: Document, start: int, stop: int | None) -> str:
    return document.text.encode("utf-8")[start:stop].decode("utf-8")


def _place(source: FileDocuments, document: int, tail: int) -> tuple[int, int]:
    """The part, and the byte in it, at which the last `tail` bytes of a document begin."""
    part = source.num_parts(document) - 1
    while tail > source.part_bytes(document, part):
        tail -= source.part_bytes(document, part)
        part -= 1
    return part, source.part_bytes(document, part) - tail


def _to_character(source: FileDocuments, document: int, tail: int) -> int:
    """`tail`, lengthened to begin with a whole character; 0 if that would be the whole document."""
    if tail == 0:
        return 0
    part, byte = _place(source, document, tail)
    encoded = source.read(document, part).text.encode("utf-8")
    while byte > 0 and encoded[byte] & 0xC0 == 0x80:
        byte -= 1
        tail += 1
    return tail if (part, byte) > (0, 0) else 0
