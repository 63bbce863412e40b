"""Files and folders in, numbered documents out.

FileDocuments knows where every document lies and reads it when asked, by number. It holds a few numbers a document, not
the texts. A Source is what a mixture is made of: documents to train on, and others held out.
"""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fireflyer.data.draws import many_words, permutation
from fireflyer.data.files import (
    ENDINGS,
    JSONL_ENDING,
    PARQUET_ENDING,
    ReadOptions,
    read_jsonl,
    read_text,
    scan_jsonl,
    scan_text,
)
from fireflyer.data.parquet import WINDOW_BYTES, ParquetReader, scan_parquet
from fireflyer.errors import UserError


@dataclass(frozen=True)
class Document:
    """A text, or one part of a long one. Tokens that start before character `loss_from` are no labels; 0: all are."""

    text: str
    loss_from: int = 0


class Source(Protocol):
    """What data/mixture.py mixes. A training document is a number; it is read part by part, mostly just part 0."""

    @property
    def name(self) -> str: ...

    @property
    def num_documents(self) -> int | None:
        """Training documents in an epoch; None for a source without end."""
        ...

    @property
    def num_bytes(self) -> int | None:
        """UTF-8 bytes of them, None if there is no end."""
        ...

    def fingerprint(self) -> str:
        """Changes when the documents do."""
        ...

    def order(self, *key: int | str) -> Sequence[int] | np.ndarray:
        """The numbers of all training documents, each once, in an order that follows from the key."""
        ...

    def num_parts(self, document: int) -> int: ...

    def read(self, document: int, part: int = 0) -> Document: ...

    def held_out_documents(self) -> Iterator[Iterator[Document]]:
        """The documents held out from training, each as its parts: always the same, in an order as good as random."""
        ...


class FileDocuments:
    """The documents of some files, in the order of the files.

    One plain-text file is one document (long ones are read in parts), one line of JSON lines or row of parquet is one.
    Texts of white space alone are left out.
    """

    def __init__(self, name: str, files: Sequence[Path], options: ReadOptions, skip_invalid: bool = False) -> None:
        """Reads everything once. Raises UserError at the first file, line or byte that is not text, or if there is no
        text at all; `skip_invalid` leaves out files with such an error instead."""
        self.name = name
        self._files = list(files)
        self._options = options
        self._parquet = ParquetReader(options)
        index = _Index()
        for number, path in enumerate(self._files):
            mark = index.mark()
            try:
                index.add_file(number, path, options)
            except UserError:
                if not skip_invalid:
                    raise
                index.cut_back(mark)
        if not index.hashes:
            what = f"{files[0]} is empty" if len(files) == 1 else f"all {len(files)} files in {name} are empty"
            raise UserError(f"{what}: no text to train on")
        self._part_files = np.array(index.part_files)
        self._part_offsets = np.array(index.part_offsets)
        self._part_raw_bytes = np.array(index.part_raw_bytes)
        self._part_bytes = np.array(index.part_bytes)
        self._first_parts = np.array([*index.first_parts, len(index.part_files)])
        self._groups = np.array(index.groups)
        self.hashes = np.array(index.hashes)

    @property
    def num_documents(self) -> int:
        return len(self.hashes)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return int(self._part_bytes.sum())

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document, int64."""
        return np.add.reduceat(self._part_bytes, self._first_parts[:-1])

    def fingerprint(self) -> str:
        """Changes when a document does, or their order."""
        return hashlib.sha256(self.hashes.astype("<u8").tobytes()).hexdigest()[:16]

    def num_parts(self, index: int) -> int:
        return int(self._first_parts[index + 1] - self._first_parts[index])

    def part_bytes(self, index: int, part: int) -> int:
        """UTF-8 bytes of one part of document `index`."""
        return int(self._part_bytes[self._first_parts[index] + part])

    def read(self, index: int, part: int = 0) -> Document:
        """Part `part` of document `index`."""
        entry = self._first_parts[index] + part
        path = self._files[int(self._part_files[entry])]
        offset, raw_bytes = int(self._part_offsets[entry]), int(self._part_raw_bytes[entry])
        ending = path.suffix.lower()
        if ending == PARQUET_ENDING:
            return Document(self._parquet.read(path, offset))
        if ending == JSONL_ENDING:
            return Document(read_jsonl(path, offset, raw_bytes, self._options))
        return Document(read_text(path, offset, raw_bytes, self._options))

    def order(self, *key: int | str) -> np.ndarray:
        """All documents in a random order for a key, int64.

        Rows of parquet are mixed within windows of randomly chosen row groups, since a group has to be decoded whole.
        """
        if len(np.unique(self._groups)) == self.num_documents:
            return permutation(self.num_documents, *key)
        starts = np.flatnonzero(np.diff(self._groups, prepend=-1))
        group_bytes = np.add.reduceat(self.document_bytes, starts)
        shuffled = permutation(len(starts), *key, "groups")
        window = np.empty_like(shuffled)
        window[shuffled] = np.cumsum(group_bytes[shuffled]) // WINDOW_BYTES
        window_of_document = np.repeat(window, np.diff(starts, append=self.num_documents))
        return np.lexsort((many_words(self.num_documents, *key), window_of_document))


class _Index:
    """Where each part and document lies, while files are being read."""

    def __init__(self) -> None:
        self.part_files = array("i")
        self.part_offsets = array("q")
        self.part_raw_bytes = array("q")
        self.part_bytes = array("q")
        self.first_parts = array("q")
        self.hashes = array("Q")
        self.groups = array("q")
        self._next_group = 0

    def add_file(self, number: int, path: Path, options: ReadOptions) -> None:
        ending = path.suffix.lower()
        if ending == PARQUET_ENDING:
            self._add_parquet(number, path, options)
        elif ending == JSONL_ENDING:
            for part in scan_jsonl(path, options):
                self._add_document(number, part.offset, part.raw_bytes, part.text)
        else:
            self._add_text(number, path, options)

    def mark(self) -> tuple[int, int]:
        return len(self.part_files), len(self.hashes)

    def cut_back(self, mark: tuple[int, int]) -> None:
        parts, documents = mark
        for column in (self.part_files, self.part_offsets, self.part_raw_bytes, self.part_bytes):
            del column[parts:]
        for column in (self.first_parts, self.hashes, self.groups):
            del column[documents:]

    def _add_text(self, number: int, path: Path, options: ReadOptions) -> None:
        mark = self.mark()
        digest = hashlib.sha256()
        blank = True
        for part in scan_text(path, options):
            encoded = part.text.encode("utf-8")
            digest.update(encoded)
            blank = blank and not part.text.strip()
            self._add_part(number, part.offset, part.raw_bytes, len(encoded))
        if blank:
            self.cut_back(mark)
        else:
            self._end_document(mark[0], digest.digest())

    def _add_parquet(self, number: int, path: Path, options: ReadOptions) -> None:
        last = None
        for group, part in scan_parquet(path, options):
            before = len(self.hashes)
            self._add_document(number, part.offset, part.raw_bytes, part.text)
            if len(self.hashes) > before and group == last:
                self.groups[-1] = self.groups[-2]
            elif len(self.hashes) > before:
                last = group

    def _add_document(self, number: int, offset: int, raw_bytes: int, text: str) -> None:
        if text.strip():
            encoded = text.encode("utf-8")
            self._add_part(number, offset, raw_bytes, len(encoded))
            self._end_document(len(self.part_files) - 1, hashlib.sha256(encoded).digest())

    def _add_part(self, number: int, offset: int, raw_bytes: int, num_bytes: int) -> None:
        self.part_files.append(number)
        self.part_offsets.append(offset)
        self.part_raw_bytes.append(raw_bytes)
        self.part_bytes.append(num_bytes)

    def _end_document(self, first_part: int, digest: bytes) -> None:
        self.first_parts.append(first_part)
        self.hashes.append(int.from_bytes(digest[:8], "big"))
        self.groups.append(self._next_group)
        self._next_group += 1


def find_files(path: Path) -> list[Path]:
    """The readable files of a folder in the order of their names, hidden ones left out; or the one file. UserError if
    there is none."""
    if not path.exists():
        raise UserError(f"no data at {path}: give a file, a folder, builtin:stdlib or builtin:arithmetic")
    understood = f"files ending in {' '.join(ENDINGS)} are understood"
    if not path.is_dir():
        if path.suffix.lower() not in ENDINGS:
            raise UserError(f"{path}: don't know how to read {path.suffix or 'a file without an ending'}; {understood}")
        return [path]
    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in ENDINGS and Path(folder, name).is_file()
        ]
    if not found:
        raise UserError(f"{path}: no file in this folder can be read; {understood}")
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"{error.filename}: can't be read: {error.strerror}") from error
