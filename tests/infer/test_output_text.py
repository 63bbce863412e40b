"""Text as it grows: whatever the cutting, the same as read character by character; nothing shown is taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.infer.output_text import OutputText, find_stop, held_length


def read_by_character(text, stop, early=0):
    """The definition: append characters; the moment the text ends with a stop string, the longest such ends it, unless
    it is `early` characters long at most."""
    shown = ""
    for character in text:
        shown += character
        ending = [string for string in stop if shown.endswith(string) and len(shown) > early]
        if ending:
            longest = max(ending, key=len)
            return shown[: -len(longest)], longest
    return shown, None


class Pieces:
    """A decoder whose tokens are the pieces of a text."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token_id):
        return self.pieces[token_id]

    def flush(self):
        return self.rest


short = st.text(alphabet="ab\n", max_size=12)


@given(
    pieces=st.lists(short, max_size=8),
    rest=short,
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3, unique=True),
)
def test_any_cutting_gives_what_reading_by_character_gives(pieces, rest, stop):
    output = OutputText(Pieces(pieces, rest), stop)
    expected, stopped_by = read_by_character("".join(pieces) + rest, stop)
    released = ""
    for token in range(len(pieces)):
        stopped = output.push(token)
        released += output.take()
        assert expected.startswith(released)
        if stopped:
            break
        # Held back is only what could still become a stop string.
        seen = "".join(pieces[: token + 1])
        assert len(seen) - len(released) <= max((len(string) - 1 for string in stop), default=0)
    output.finish()
    released += output.take()
    assert (released, output.stopped_by) == (expected, stopped_by)
    assert output.text == expected


@given(
    pieces=st.lists(short, max_size=8),
    stop=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3, unique=True),
    min_tokens=st.integers(0, 9),
    include_stop=st.booleans(),
)
def test_stop_strings_before_min_tokens_are_text_and_may_stay(pieces, stop, min_tokens, include_stop):
    output = OutputText(Pieces(pieces), stop, include_stop=include_stop, min_tokens=min_tokens)
    early = len("".join(pieces[:min_tokens]))
    expected, stopped_by = read_by_character("".join(pieces), stop, early)
    if include_stop and stopped_by is not None:
        expected += stopped_by
    for token in range(len(pieces)):
        if output.push(token):
            assert token >= min_tokens
            break
    output.finish()
    assert (output.take(), output.stopped_by) == (expected, stopped_by)


@pytest.mark.parametrize(
    ("text", "stop", "found"),
    [
        ("abcd", ["abcd", "c"], (2, "c")),
        ("abcd", ["c", "abcd"], (2, "c")),
        ("xabc", ["c", "abc"], (1, "abc")),
        ("xabc", ["abc", "c"], (1, "abc")),
        ("aXbY", ["Y", "X"], (1, "X")),
        ("abc", ["x"], None),
    ],
)
def test_the_stop_string_that_is_complete_first_wins(text, stop, found):
    assert find_stop(text, stop) == found


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [("hello\n", ["\n\n"], 1), ("aab", ["abc"], 2), ("abc", ["abcabd"], 3), ("x", ["yx"], 0)],
)
def test_only_the_beginning_of_a_stop_string_waits(text, stop, length):
    assert held_length(text, stop) == length


def test_an_emoji_in_pieces_and_a_torn_one(tokenizer):
    from fireflyer.text.stream import StreamDecoder

    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    tokens = [by_byte[bytes([byte])] for byte in "a👩b".encode()]
    output = OutputText(StreamDecoder(tokenizer))
    parts = []
    for token in tokens:
        assert not output.push(token)
        parts.append(output.take())
    assert parts == ["a", "", "", "", "👩", "b"]

    torn = OutputText(StreamDecoder(tokenizer))
    parts = []
    for token in tokens[:4]:
        torn.push(token)
        parts.append(torn.take())
    torn.finish()
    assert [*parts, torn.take()] == ["a", "", "", "", "\ufffd"]


def test_a_torn_end_may_complete_a_stop_string(tokenizer):
    from fireflyer.text.stream import StreamDecoder

    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    output = OutputText(StreamDecoder(tokenizer), ["a\ufffd"])
    for byte in (b"b", b"a", b"\xf0"):
        output.push(by_byte[byte])
    assert output.take() == "b"
    assert output.finish()
    assert (output.text, output.stopped_by) == ("b", "a\ufffd")
