"""Fill in the middle: chosen at its rate, cut anywhere, nothing lost."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.data.documents import Document
from fireflyer.data.encoding import Encoder, RawPart
from fireflyer.data.fim import split_middle
from fireflyer.data.loader import Loader
from fireflyer.data.mixture import open_sources
from fireflyer.errors import UserError
from fireflyer.text.special_tokens import BEGIN, END, FIM_BEGIN, FIM_END, FIM_HOLE
from fireflyer.text.tokenizer import Tokenizer


@given(text=st.text(max_size=30), key=st.integers())
def test_the_three_parts_join_to_the_text(text: str, key: int) -> None:
    parts = split_middle(text, 1.0, key)
    assert parts is not None
    assert "".join(parts) == text
    assert split_middle(text, 1.0, key) == parts
    assert split_middle(text, 0.0, key) is None


def test_every_place_between_characters_can_be_cut() -> None:
    expected = {("ab"[:i], "ab"[i:j], "ab"[j:]) for i in range(3) for j in range(i, 3)}
    assert {split_middle("ab", 1.0, key) for key in range(200)} == expected


def test_one_in_ten_documents_is_cut_and_the_cuts_are_uniform() -> None:
    n, length = 20_000, 99
    chosen = [parts for i in range(n) if (parts := split_middle("x" * length, 0.1, 7, 0, 0, i))]
    assert abs(len(chosen) - 0.1 * n) < 4 * math.sqrt(n * 0.1 * 0.9)
    # The smaller and the larger of two uniform numbers have means 1/3 and 2/3, so each part a third.
    for part in range(3):
        mean = sum(len(parts[part]) for parts in chosen) / len(chosen)
        assert abs(mean - length / 3) < 4 * length * math.sqrt(1 / 18 / len(chosen))


def test_the_choice_changes_with_seed_source_epoch_and_document() -> None:
    def choices(seed: int, source: int, epoch: int, shift: int) -> list[bool]:
        return [split_middle("text", 0.5, seed, source, epoch, i + shift) is not None for i in range(200)]

    lists = [choices(*key) for key in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 500))]
    assert all(a != b for i, a in enumerate(lists) for b in lists[:i])


def test_the_report_order_of_tokens(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer, fill_in_middle=True)
    parts = RawPart(Document("abcdef"), middle_out=("ab", "cd", "ef"))
    [stream, plain] = encoder.encode([parts, RawPart(Document("abcdef"))])
    text = tokenizer.decode(list(stream.tokens), skip_special=False)
    assert text == f"{BEGIN}{FIM_BEGIN}ab{FIM_HOLE}ef{FIM_END}cd{END}"
    assert stream.counts.all()
    assert tokenizer.decode(list(plain.tokens)) == "abcdef"


def test_documents_with_a_prompt_and_those_in_parts_stay_whole(folder, tokenizer: Tokenizer) -> None:
    mixture = open_sources(["builtin:arithmetic", str(folder({"long.txt": "word " * 300_000}))])
    assert mixture.sources[1].num_parts(0) > 1
    fim_ids = {tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END)}
    loader = Loader(mixture, tokenizer, seq_len=64, seed=0, fim_rate=1.0)
    seen = set(loader.next_batch(200).input_ids_BT.flatten().tolist())
    assert not seen & fim_ids


def test_a_tokenizer_without_the_tokens_is_refused(folder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(FIM_HOLE.encode(), b"<other>"))
    mixture = open_sources([str(folder({"a.txt": "some text " * 99}))])
    with pytest.raises(UserError, match=f"data.fim_rate needs .*{FIM_HOLE}"):
        Loader(mixture, Tokenizer.from_file(path), seq_len=8, seed=0, fim_rate=0.1)
