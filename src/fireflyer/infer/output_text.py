"""From tokens to the text a reader may see. In: token ids one by one. Out: whole characters only, never a part of a
stop string, never a character that is taken back later.

However the tokens cut the text, the result is that of reading it character by character: the stop string that is
complete first ends it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fireflyer.text.stream import StreamDecoder


def find_stop(text: str, stop: Sequence[str], after: int = 0) -> tuple[int, str] | None:
    """(start, stop string) of the one that is complete first, the longest of those that end together; None if none is.

    Deciding by the end makes the answer the same for every way of cutting the text into pieces. Strings that are
    complete within the first `after` characters do not count.
    """
    found: tuple[int, int, str] | None = None
    for string in stop:
        start = text.find(string, max(after + 1 - len(string), 0))
        if start >= 0 and (found is None or (start + len(string), start) < found[:2]):
            found = (start + len(string), start, string)
    return None if found is None else found[1:]


def held_length(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string: these must wait."""
    longest = max((len(string) for string in stop), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(len(string) > length and text.endswith(string[:length]) for string in stop):
            return length
    return 0


class OutputText:
    """The text of one request while it grows.

    Stop strings that are complete with the first `min_tokens` tokens are text like any other (as in vLLM); with
    `include_stop` the one that ends the text stays at its end.
    """

    def __init__(
        self, decoder: StreamDecoder, stop: Sequence[str] = (), *, include_stop: bool = False, min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._stop = stop
        self._include_stop = include_stop
        self._early_tokens = min_tokens
        self._held = ""
        self._taken = 0
        self._parts: list[str] = []
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All that has been released."""
        return "".join(self._parts)

    def push(self, token_id: int) -> bool:
        """Add a token; True when it completes a stop string, which then ends the text."""
        late = self._early_tokens <= 0
        self._early_tokens -= 1
        return self._add(self._decoder.push(token_id), late)

    def finish(self) -> bool:
        """Release what was held back, with U+FFFD for a character that never became whole; True as for `push`."""
        if self.stopped_by is None and not self._add(self._decoder.flush(), late=True):
            self._parts.append(self._held)
        self._held = ""
        return self.stopped_by is not None

    def take(self) -> str:
        """What was released since the last call."""
        new = self._parts[self._taken :]
        self._taken = len(self._parts)
        return "".join(new)

    def _add(self, characters: str, late: bool) -> bool:
        if not self._stop:
            self._parts.append(characters)
            return False
        text = self._held + characters
        found = find_stop(text, self._stop, after=len(self._held)) if late else None
        if found is not None:
            start, self.stopped_by = found
            self._parts.append(text[: start + len(self.stopped_by)] if self._include_stop else text[:start])
            self._held = ""
            return True
        held = held_length(text, self._stop)
        self._parts.append(text[: len(text) - held])
        self._held = text[len(text) - held :]
        return False
