"""Weighted sources, their epochs, and the text held out from them.

In: specs such as `books/:3`, `notes.jsonl`, `builtin:stdlib`. Out: a Mixture; data/loader.py turns it into batches.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from fireflyer.data.arithmetic import ArithmeticSource
from fireflyer.data.builtin import STDLIB, stdlib_documents
from fireflyer.data.documents import FileDocuments, Source, find_files
from fireflyer.data.expressions import ExpressionSource
from fireflyer.data.files import ReadOptions
from fireflyer.data.needles import needle_source
from fireflyer.data.split import FileSource, split_by_hash
from fireflyer.errors import UserError

Item = TypeVar("Item")

# A tokenizer learns nothing more from an endless source after so many documents.
_ENDLESS_SAMPLE = 4096


def open_sources(
    specs: Sequence[str],
    *,
    encoding_errors: str = "strict",
    text_column: str = "text",
    seed: int = 0,
    held_out: float = 0.01,
) -> "Mixture":
    """Open PATH[:WEIGHT] and builtin:NAME[:WEIGHT] (stdlib, arithmetic, expressions, needles-N), and read it all once.

    Weights are shares of the tokens. With none given anywhere, sources count by their size, so that all of them are
    through at the same time; with some given, the others weigh 1. `held_out` is the share of documents set apart for
    evaluation (1: all, for data that is only evaluated on); `seed` chooses the problems of the builtin: ones. Raises
    UserError with file and line or byte at whatever can't be read.
    """
    if not specs:
        raise UserError("no data: name at least one file, folder or builtin: source")
    if encoding_errors not in ("strict", "replace"):
        raise UserError(f'data.encoding_errors must be "strict" or "replace", got {encoding_errors!r}')
    options = ReadOptions(encoding_errors, text_column)
    parsed = [parse_spec(spec) for spec in specs]
    opened = [_open_source(name, options, seed) for name, _ in parsed]
    files = [source for source in opened if isinstance(source, FileDocuments)]
    split = iter(zip(files, split_by_hash(files, held_out), strict=True))
    sources = [FileSource(*next(split)) if isinstance(source, FileDocuments) else source for source in opened]
    return Mixture(sources, [weight for _, weight in parsed])


def parse_spec(spec: str) -> tuple[str, float | None]:
    """Split PATH[:WEIGHT]. A path that exists as it is written is a path, colons and all."""
    name, colon, suffix = spec.rpartition(":")
    if not colon or spec in (STDLIB, ArithmeticSource.name, ExpressionSource.name) or Path(spec).exists():
        return spec, None
    try:
        weight = float(suffix)
    except ValueError:
        return spec, None
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"{spec}: the weight of a source must be above 0, got {suffix}")
    return name, weight


def _open_source(name: str, options: ReadOptions, seed: int) -> FileDocuments | Source:
    if name == STDLIB:
        return stdlib_documents()
    if name == ArithmeticSource.name:
        return ArithmeticSource(seed)
    if name == ExpressionSource.name:
        return ExpressionSource(seed)
    if (needles := needle_source(name, seed)) is not None:
        return needles
    if name.startswith("builtin:") and not Path(name).exists():
        there = f"{STDLIB}, {ArithmeticSource.name}, {ExpressionSource.name} and builtin:needles-N, N tokens long"
        raise UserError(f"no data called {name}: there are {there}")
    return FileDocuments(name, find_files(Path(name)), options)


class Mixture:
    """Sources and their weights, which are shares of the tokens."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float | None] | None = None) -> None:
        self.sources = list(sources)
        self.weights = _fill_weights(self.sources, weights or [None] * len(self.sources))

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def endless(self) -> bool:
        """Whether some source never ends, so that there are no epochs."""
        return any(source.num_documents is None for source in self.sources)

    def fingerprint(self) -> list[str]:
        """One string a source; it changes when the source's text does."""
        return [source.fingerprint() for source in self.sources]

    def order(self, source: int, seed: int, epoch: int) -> Sequence[int] | np.ndarray:
        """The document numbers of one epoch of one source, each once."""
        return self.sources[source].order(seed, "order", source, epoch)

    def sample_texts(self, seed: int) -> Iterator[str]:
        """Training text in random order, mixed by weight, each document at most once: to train a tokenizer on."""
        streams = [self._sample_one(source, seed) for source in range(len(self.sources))]
        return interleave(streams, self.weights, size=len)

    def _sample_one(self, number: int, seed: int) -> Iterator[str]:
        source = self.sources[number]
        last = _ENDLESS_SAMPLE if source.num_documents is None else None
        for document in islice(self.order(number, seed, 0), last):
            for part in range(source.num_parts(int(document))):
                yield source.read(int(document), part).text


def interleave(
    streams: Sequence[Iterable[Item]], weights: Sequence[float], size: Callable[[Item], int]
) -> Iterator[Item]:
    """Take items so that every stream's share of the total size follows its weight; streams that end drop out."""
    live = {number: iter(stream) for number, stream in enumerate(streams)}
    taken = [0] * len(streams)
    while live:
        number = min(live, key=lambda i: (taken[i] / weights[i], i))
        try:
            item = next(live[number])
        except StopIteration:
            del live[number]
            continue
        taken[number] += size(item)
        yield item


def _fill_weights(sources: Sequence[Source], weights: Sequence[float | None]) -> list[float]:
    sizes = [float(source.num_bytes or 0) for source in sources]
    if all(weight is None for weight in weights) and all(sizes):
        return sizes
    return [1.0 if weight is None else weight for weight in weights]
