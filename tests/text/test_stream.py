"""Text that is shown while it is generated comes in whole characters and adds up to the text."""

from hypothesis import given
from hypothesis import strategies as st

from fireflyer.text.special_tokens import RESERVED
from fireflyer.text.stream import StreamDecoder
from fireflyer.text.tokenizer import Tokenizer

BYTES = Tokenizer.train([], len(RESERVED) + 256)


@given(ids=st.lists(st.integers(0, BYTES.vocab_size + 3), max_size=40))
def test_pieces_join_to_the_decoded_text_for_any_ids(ids: list[int]) -> None:
    stream = StreamDecoder(BYTES)
    assert "".join([*map(stream.push, ids), stream.flush()]) == BYTES.decode(ids)


@given(text=st.text(max_size=20))
def test_only_whole_characters_appear(text: str) -> None:
    stream = StreamDecoder(BYTES)
    pieces = [stream.push(i) for i in BYTES.encode(text)]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert stream.flush() == ""


def test_a_torn_tail_is_replaced_and_the_decoder_starts_afresh() -> None:
    stream = StreamDecoder(BYTES)
    first, second, *_ = BYTES.encode("🙂")
    assert (stream.push(first), stream.push(second), stream.flush()) == ("", "", "\ufffd")
    assert "".join(map(stream.push, BYTES.encode("é"))) == "é"
