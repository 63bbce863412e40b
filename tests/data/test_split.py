"""What is held out is never trained on, nothing else is lost, and identical text is on one side."""

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fireflyer.data.files import ReadOptions
from fireflyer.data.mixture import Mixture, open_sources
from fireflyer.data.split import _Splitter
from fireflyer.errors import UserError


def write_rows(path: Path, rows: list[str]) -> str:
    path.write_bytes("".join(json.dumps({"text": row}) + "\n" for row in rows).encode())
    return str(path)


def training(mixture: Mixture, number: int) -> list[str]:
    source = mixture.sources[number]
    return [
        "".join(source.read(int(i), part).text for part in range(source.num_parts(int(i))))
        for i in sorted(mixture.order(number, 0, 0))
    ]


def held_out(mixture: Mixture, number: int) -> list[str]:
    return ["".join(part.text for part in parts) for parts in mixture.sources[number].held_out_documents()]


def test_documents_are_held_out_by_the_hash_of_their_text(tmp_path: Path) -> None:
    rows = [f"document number {i}" for i in range(2000)]
    expected = [row for row in rows if hashlib.sha256(row.encode()).digest()[:8] < (2**64 // 10).to_bytes(8, "big")]
    mixture = open_sources([write_rows(tmp_path / "a.jsonl", rows)], held_out=0.1)
    assert sorted(held_out(mixture, 0)) == sorted(expected)
    assert training(mixture, 0) == [row for row in rows if row not in expected]
    assert 150 < len(expected) < 250
    # Another order, another name, more text: the same decisions.
    more = open_sources([write_rows(tmp_path / "b.jsonl", [*rows[::-1], *map(str, range(99))])], held_out=0.1)
    assert set(expected) <= set(held_out(more, 0))
    assert not set(expected) & set(training(more, 0))


# Brackets around each text, so that the head or tail of one is never mistaken for another.
row = st.one_of(st.sampled_from(["", "é", "same text", "🙂" * 40]), st.text("ab é🙂", max_size=300)).map("<{}>".format)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    sources=st.lists(st.lists(row, min_size=1, max_size=6), min_size=1, max_size=3),
    share=st.sampled_from([0.01, 0.3, 0.6, 0.95]),
)
def test_any_split_loses_nothing_and_keeps_copies_together(tmp_path: Path, sources: list[list[str]], share) -> None:
    specs = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(sources)]
    try:
        mixture = open_sources(specs, held_out=share)
    except UserError:  # too little to hold some out
        assert sum(len(row.encode()) for rows in sources for row in set(rows)) < 40
        return
    decisions: dict[str, str] = {}
    for number, rows in enumerate(sources):
        assert mixture.sources[number].num_documents
        kept, held = training(mixture, number), held_out(mixture, number)
        assert "" not in kept + held
        for text in rows:
            if text in held:
                decision = "held out"
            elif any(text == head + tail for head in kept for tail in held):
                decision = "cut"
            else:
                decision = "training"
                assert text in kept
            assert decisions.setdefault(text, decision) == decision
        whole = sum(decisions[text] == "training" for text in rows)
        cut = sum(decisions[text] == "cut" for text in rows)
        assert len(kept) == whole + cut
    assert any(decision != "training" for decision in decisions.values())


def test_the_tail_of_one_text_is_held_out_at_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text, tail_bytes in (("ü" * 50_000, 1000), ("🙂" * 500, 400), ("🙂" * 99, 99)):
        path.write_bytes(text.encode())
        mixture = open_sources([str(path)], held_out=0.01)
        [kept], [held] = training(mixture, 0), held_out(mixture, 0)
        assert kept + held == text
        assert tail_bytes <= len(held.encode()) < tail_bytes + 4


def test_the_tail_of_a_text_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fireflyer.data.mixture.ReadOptions", partial(ReadOptions, part_bytes=64))
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "copy.jsonl").write_bytes(json.dumps({"text": text}).encode())
    mixture = open_sources([str(tmp_path / "a.txt"), str(tmp_path / "copy.jsonl")], held_out=0.1)
    assert mixture.sources[0].num_parts(0) > 100
    assert mixture.sources[1].num_parts(0) == 1
    assert training(mixture, 0) == training(mixture, 1)
    assert held_out(mixture, 0) == held_out(mixture, 1)
    assert training(mixture, 0)[0] + held_out(mixture, 0)[0] == text


def test_a_tail_of_whole_parts_leaves_no_empty_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fireflyer.data.mixture.ReadOptions", partial(ReadOptions, part_bytes=64))
    (tmp_path / "a.txt").write_bytes(b"x" * 6300)  # parts of 63 bytes, as no line break says where to end them
    source = open_sources([str(tmp_path / "a.txt")], held_out=0.1).sources[0]
    assert [len(source.read(0, part).text) for part in range(source.num_parts(0))] == [63] * 90


def test_many_copies_of_one_short_text_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    original = _Splitter._copies
    monkeypatch.setattr(_Splitter, "_copies", lambda *args: looks.append(1) or original(*args))
    with pytest.raises(UserError, match="too little"):
        open_sources([write_rows(tmp_path / "a.jsonl", ["a"] * 1000)])
    mixture = open_sources([write_rows(tmp_path / "b.jsonl", ["a"] * 1000 + ["bb"] * 25 + ["c"] * 350)])
    assert held_out(mixture, 0) == ["c"] * 350  # a quarter of the text
    assert len(looks) < 10


@pytest.mark.parametrize("text", ["a", "é", "🙂"])
def test_a_text_too_short_to_be_cut_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=f"{len(text.encode())} bytes of text are too little to hold some out"):
        open_sources([write_rows(tmp_path / "a.jsonl", [text])])


def test_all_or_nothing_can_be_held_out(tmp_path: Path) -> None:
    spec = write_rows(tmp_path / "a.jsonl", ["one", "two"])
    assert training(open_sources([spec], held_out=0), 0) == ["one", "two"]
    assert held_out(open_sources([spec], held_out=0), 0) == []
    assert sorted(held_out(open_sources([spec], held_out=1), 0)) == ["one", "two"]
    with pytest.raises(UserError, match=r"held_out must be a share from 0 to 1, got 1\.5"):
        open_sources([spec], held_out=1.5)
