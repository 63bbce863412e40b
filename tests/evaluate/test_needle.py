"""Needles lie where they should, texts are as long as asked, and the map is what the answers say."""

from __future__ import annotations

import json

import pytest

from fireflyer.errors import UserError
from fireflyer.evaluate.needle import needle_items, needle_map, needle_svg
from fireflyer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["The gardener walked along the river in the morning."] * 8, vocab_size=320)


@pytest.mark.parametrize("way", ["plain", "chat"])
def test_depth_and_length(tokenizer, way):
    items = needle_items(tokenizer, way, [400, 900], None, seed=0)
    assert len(items) == 10
    for item in items:
        needle = f"are {item.problem['answer']}."
        assert item.question.count(needle) == 1
        before, _, after = item.question.partition(needle)
        body = len(item.question) - len(item.question.rpartition("\n\n")[2])
        assert len(before) / body == pytest.approx(item.problem["depth"], abs=0.25)
        used = len(tokenizer.encode(item.question))
        assert item.problem["length"] - 80 < used < item.problem["length"]
        assert "secret words" in after
    assert len({item.problem["answer"] for item in items}) == 10
    assert needle_items(tokenizer, way, [400, 900], None, seed=0) == items


def test_another_text(tokenizer, tmp_path):
    path = tmp_path / "essay.txt"
    path.write_text("An essay has sentences. " * 100)
    (item, *_) = needle_items(tokenizer, "plain", [300], path, seed=0)
    assert "An essay has sentences. An essay" in item.question
    with pytest.raises(UserError, match="give a longer text"):
        needle_items(tokenizer, "plain", [30_000], path, seed=0)


def test_the_map(tokenizer):
    items = needle_items(tokenizer, "plain", [400], None, seed=0)
    records = [{"number": n, "samples": [{"correct": n % 2 == 0}, {"correct": False}]} for n in range(5)]
    cells = needle_map(items, records)
    assert [cell["found"] for cell in cells] == [0.5, 0, 0.5, 0, 0.5]
    assert [cell["depth"] for cell in cells] == [0, 0.25, 0.5, 0.75, 1]
    assert json.loads(json.dumps(cells)) == cells
    assert needle_svg(cells, "a < b").count("<rect") == 6
    assert "a &lt; b" in needle_svg(cells, "a < b")
