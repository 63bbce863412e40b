"""Needles: a document fills its row to the token, and what is asked for lies in it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from fireflyer.data.loader import Loader
from fireflyer.data.mixture import open_sources
from fireflyer.data.needles import PLACES, NeedleSource
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer

_SAID = re.compile(r"The secret words of (\S+) are (\w+ and \w+)\.")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    source = NeedleSource(256, 0)
    return Tokenizer.train([source.read(number).text for number in range(1500)], 1024)


@pytest.mark.parametrize("length", [64, 100, 256, 1024, 4096])
def test_documents_are_rows(tokenizer: Tokenizer, length: int):
    source = NeedleSource(length, 1)
    for number in range(12):
        assert len(tokenizer.encode(source.read(number).text)) == length - 2


def test_a_row_holds_one_document_and_answers_alone_are_trained_on(tokenizer: Tokenizer):
    loader = Loader(open_sources(["builtin:needles-256"], seed=3), tokenizer, seq_len=256, seed=0)
    batch = loader.next_batch(5)
    for row in range(5):
        ids, labels = batch.input_ids_BT[row].tolist(), batch.labels_BT[row]
        assert ids.count(tokenizer.bos_id) == ids.count(tokenizer.eos_id) == 1
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        learnt = tokenizer.decode([int(label) for label in labels if label >= 0], skip_special=True)
        assert learnt == NeedleSource(256, 3).read(row).text.partition("\n\n")[2]


@pytest.mark.parametrize("length", [64, 256, 2048])
def test_what_is_asked_was_said_once_before(length: int):
    places: Counter[str] = Counter()
    for number in range(30):
        document = NeedleSource(length, 5).read(number)
        said, asked = (
            _SAID.findall(part) for part in (document.text[: document.loss_from], document.text[document.loss_from :])
        )
        assert len(dict(said)) == len(said) >= 1
        assert set(asked) == set(said)
        assert len(asked) == len(document.text[document.loss_from :].split("\n\n"))
        places.update(place for place, _ in said)
    if length == 2048:
        assert set(places) == set(PLACES)


def test_documents_follow_from_seed_and_number_and_the_held_out_are_others():
    source = NeedleSource(128, 0)
    texts = {source.read(number).text for number in range(50)}
    assert len(texts) == 50
    assert source.read(7) == NeedleSource(128, 0).read(7) != NeedleSource(128, 1).read(7)
    held_out = {next(parts).text for parts in source.held_out_documents()}
    assert len(held_out) == 256
    assert not held_out & texts


def test_needles_lie_anywhere():
    """Their depths, in characters of the text, are spread evenly: each fifth has its fifth, give or take."""
    fifths: Counter[int] = Counter()
    for number in range(200):
        text = NeedleSource(512, 2).read(number).text
        body = text.partition("\n\n")[0]
        fifths.update(int(5 * match.start() / len(body)) for match in _SAID.finditer(body))
    assert min(fifths.values()) > 0.7 * fifths.total() / 5


def test_refusals():
    with pytest.raises(UserError, match="at least 64 tokens"):
        open_sources(["builtin:needles-63"])
    with pytest.raises(UserError, match="builtin:needles-N, N tokens long"):
        open_sources(["builtin:needles"])
    assert open_sources(["builtin:needles-64:2", "builtin:needles-128:1"]).weights == [2, 1]
