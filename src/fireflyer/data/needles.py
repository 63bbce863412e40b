"""builtin:needles-N: words hidden in a text that says nothing, and asked for at its end; documents of N tokens.

Out: sentences, among them `The secret words of Lisbon are amber and falcon.` for one place or several; then, after an
empty line each, the same sentences again in another order: the questions with their answers, and all that is trained
on. To write the words a model has to find them again, at any distance that N leaves room for. In a tokenizer trained on
this text every word is one token, so that a row of N tokens holds one document.

Words and not a number: its digits would ask for copying in order as well, which takes small models much longer to learn
than finding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from fireflyer.data.documents import Document
from fireflyer.data.draws import many_words
from fireflyer.errors import UserError

PLACES = (
    *("Accra", "Athens", "Bergen", "Bogota", "Boston", "Cairo", "Cork", "Dakar", "Delhi", "Dublin", "Geneva", "Ghent"),
    *("Hanoi", "Havana", "Izmir", "Kyoto", "Leeds", "Lima", "Lisbon", "Lyon", "Malmo", "Milan", "Nairobi", "Oslo"),
    *("Osaka", "Porto", "Prague", "Quito", "Riga", "Rome", "Seoul", "Sofia", "Taipei", "Tokyo", "Tromsø", "Tunis"),
    *("Utrecht", "Valencia", "Vienna", "Warsaw"),
)
FIRST_WORDS = (
    *("amber", "ashen", "azure", "beige", "black", "blue", "bronze", "brown", "coral", "crimson", "cyan", "ebony"),
    *("emerald", "golden", "green", "grey", "indigo", "ivory", "jade", "lilac", "maroon", "mauve", "olive", "orange"),
    *("pale", "pink", "plum", "purple", "red", "ruby", "rust", "scarlet", "silver", "tan", "teal", "umber"),
    *("violet", "white", "yellow", "bright"),
)
SECOND_WORDS = (
    *("badger", "bear", "beaver", "bison", "camel", "cobra", "crane", "crow", "deer", "dolphin", "eagle", "falcon"),
    *("ferret", "finch", "fox", "gecko", "goose", "hare", "heron", "horse", "ibis", "jackal", "koala", "lemur"),
    *("lion", "lynx", "marten", "mole", "moose", "newt", "otter", "owl", "panda", "puma", "raven", "seal"),
    *("shark", "stork", "tiger", "wolf"),
)
NEEDLE = "The secret words of {place} are {words}."
QUESTION = "\n\nThe secret words of {place} are"

_PARTS = (
    ("The gardener", "A neighbour", "The old teacher", "My cousin", "The ferryman", "Her brother", "A traveller"),
    ("walked along", "talked about", "looked for", "painted", "remembered", "passed by", "wrote about"),
    ("the river", "the market", "a quiet street", "the stone bridge", "an empty house", "the hills", "the harbour"),
    ("in the morning", "before dinner", "without haste", "as the rain began", "on the way home", "late in autumn"),
)
_NAME = re.compile(r"builtin:needles-(\d+)")
_NEEDLE_TOKENS = len("The secret words of Lisbon are amber and falcon .".split())
_SMALLEST = 64
_HELD_OUT = 256


def sentence(drawn: int) -> str:
    """A sentence that says nothing, by a random word."""
    chosen = []
    for part in _PARTS:
        drawn, which = divmod(drawn, len(part))
        chosen.append(part[which])
    return " ".join(chosen) + "."


def secret_words(drawn: int) -> str:
    """A colour and an animal, by a random word: each one token, and never two of the same kind."""
    drawn, first = divmod(drawn, len(FIRST_WORDS))
    return f"{FIRST_WORDS[first]} and {SECOND_WORDS[drawn % len(SECOND_WORDS)]}"


class NeedleSource:
    """Document i is a function of (seed, i) alone. A data.documents.Source."""

    num_documents = None
    num_bytes = None

    def __init__(self, length: int, seed: int) -> None:
        """length: of a document in tokens, its begin and end included."""
        if length < _SMALLEST:
            raise UserError(f"builtin:needles-{length} leaves no room for a question; give at least {_SMALLEST} tokens")
        self.name = f"builtin:needles-{length}"
        self.length, self.seed = length, seed

    def fingerprint(self) -> str:
        return f"{self.name} {self.seed}"

    def order(self, *key: int | str) -> range:
        return range(2**62)

    def num_parts(self, document: int) -> int:
        return 1

    def read(self, document: int, part: int = 0) -> Document:
        return self._document("training", document)

    def held_out_documents(self) -> Iterator[Iterator[Document]]:
        return (iter([self._document("held-out", number)]) for number in range(_HELD_OUT))

    def _document(self, kind: str, number: int) -> Document:
        room = self.length - 2
        most = min(len(PLACES), room // (3 * _NEEDLE_TOKENS))
        drawn = iter(many_words(4 * len(PLACES) + room, self.seed, "needles", kind, number).tolist())
        count = 1 + next(drawn) % most if next(drawn) & 1 else 1
        places = sorted(PLACES, key=lambda place: next(drawn))[:count]
        needles = [NEEDLE.format(place=place, words=secret_words(next(drawn))) for place in places]
        asked = sorted(needles, key=lambda needle: next(drawn))
        text = _haystack(needles, room - 2 * count * _NEEDLE_TOKENS, drawn)
        return Document(text + "".join(f"\n\n{needle}" for needle in asked), loss_from=len(text) + 2)


def needle_source(name: str, seed: int) -> NeedleSource | None:
    """The source of this name, None for another one's. Raises UserError where it is too short for a question."""
    match = _NAME.fullmatch(name)
    return None if match is None else NeedleSource(int(match[1]), seed)


def _haystack(needles: Sequence[str], room: int, drawn: Iterator[int]) -> str:
    """Sentences of `room` tokens with the needles anywhere among them, the first one cut where the room begins."""
    found: list[list[str]] = []
    while room > 0:
        parts = sentence(next(drawn)).split()
        room -= len(parts) + 1  # the full stop is a token
        found.append(parts)
    found.insert(0, found.pop()[-room:] or ["And"])
    texts = [" ".join(parts) for parts in found]
    for needle in needles:
        texts.insert(next(drawn) % len(texts) + 1, needle)
    return "".join(f" {text}" for text in texts)
