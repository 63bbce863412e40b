"""The tokenizer: every text comes back byte for byte, and plain text never becomes a control token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer

from fireflyer.errors import UserError
from fireflyer.text.special_tokens import BEGIN, END, HIDDEN, PAD, RESERVED, THINK_BEGIN, USER
from fireflyer.text.tokenizer import Tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n\n\n",
    "Der Fluß fließt, the river flows; 中文也可以。",
    "x = 1234567890\n",
] * 3

# Random characters, mixed with what could be mistaken for control tokens.
any_text = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*RESERVED, "<｜", "▁", "｜>", "  \n\n  ", "\r\n", "12", "👩‍👩‍👧"])),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


@given(text=any_text)
def test_every_text_comes_back_and_holds_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=len(RESERVED)) >= len(RESERVED)
    assert sum(tokenizer.byte_lengths()[i] for i in ids) == len(text.encode("utf-8"))


def test_every_byte_is_a_token(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}
    assert single == {bytes([byte]) for byte in range(256)}


def test_special_tokens_have_the_same_ids_at_any_size(tokenizer: Tokenizer) -> None:
    smallest = Tokenizer.train([], len(RESERVED) + 256)
    assert smallest.vocab_size == len(RESERVED) + 256
    assert tokenizer.vocab_size == 320
    for one in (smallest, tokenizer):
        assert [one.special_id(name) for name in RESERVED] == list(range(len(RESERVED)))
        assert (one.bos_id, one.eos_id, one.pad_id) == (0, 1, 2)
        assert one.byte_lengths()[: len(RESERVED)] == [0] * len(RESERVED)
    with pytest.raises(UserError, match="274"):
        Tokenizer.train([], 274)


def test_vocabulary_is_smaller_when_the_text_has_no_more_pairs() -> None:
    assert 275 < Tokenizer.train(["abcabc abcabc"], 5000).vocab_size < 300


def test_digits_are_single_tokens() -> None:
    tokenizer = Tokenizer.train(["12345 " * 50, "0000 " * 50], 400)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a12345+00")] == list("a12345+00")


def test_begin_and_end_are_added_only_when_asked(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("hi")
    assert tokenizer.encode("hi", bos=True, eos=True) == [tokenizer.bos_id, *plain, tokenizer.eos_id]
    assert tokenizer.decode([0, *plain, 1]) == "hi"
    assert tokenizer.decode([0, *plain, 1], skip_special=False) == f"{BEGIN}hi{END}"
    assert tokenizer.decode([tokenizer.special_id(THINK_BEGIN)]) == THINK_BEGIN


def test_a_prompt_has_one_begin_token_however_many_it_brings(tokenizer: Tokenizer) -> None:
    for begins in ("", BEGIN, BEGIN + BEGIN):
        ids = tokenizer.encode_prompt(f"{begins}hi{USER}")
        assert ids == [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.special_id(USER)]
    assert tokenizer.encode_prompt("") == [tokenizer.bos_id]


def test_allow_special_reads_control_tokens_as_transformers_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for text in (f"{BEGIN}a b{END}", f"{USER} <think>\n12</think>{PAD}", "no such token <|EOT|>", ""):
        expected = reference(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, allow_special=True) == expected
    assert reference("hello  world").input_ids == tokenizer.encode("hello  world", bos=True)
    assert reference.pad_token_id != reference.eos_token_id


def test_training_is_deterministic_across_processes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    script = (
        "import sys, tests_texts; from fireflyer.text.tokenizer import Tokenizer;"
        "Tokenizer.train(tests_texts.TEXTS, 320).save(sys.argv[1])"
    )
    (tmp_path / "tests_texts.py").write_text(f"TEXTS = {TEXTS!r}", encoding="utf-8")
    tokenizer.save(tmp_path)
    first = (tmp_path / "tokenizer.json").read_bytes()
    for threads in ("1", "3"):
        path = os.pathsep.join([str(tmp_path), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
        assert (tmp_path / "tokenizer.json").read_bytes() == first


def test_training_reads_no_more_than_its_bound() -> None:
    def texts():
        yield "aé" * 10
        raise AssertionError("read on past the bound")

    assert Tokenizer.train(texts(), 280, max_bytes=20).vocab_size <= 280


def deepseek_like(folder: Path, **config: object) -> Path:
    """A tokenizer.json laid out as DeepSeek's: control tokens behind the vocabulary, most not flagged special."""
    trained = json.loads(Tokenizer.train(TEXTS, 320)._json)
    names = list(RESERVED)
    vocabulary = [token for token in trained["model"]["vocab"] if token not in names]
    first = [BEGIN, END, PAD]
    trained["model"]["vocab"] = {token: i for i, token in enumerate(first + vocabulary)}
    ids = {token: i for i, token in enumerate(first + vocabulary + [name for name in names if name not in first])}
    trained["added_tokens"] = [
        {"id": ids[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": name not in first, "special": name in HIDDEN}
        for name in names
    ]  # fmt: skip
    trained["post_processor"]["special_tokens"][BEGIN]["ids"] = [0]
    (folder / "tokenizer.json").write_text(json.dumps(trained, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@given(text=any_text)
def test_a_deepseek_like_file_keeps_spaces_and_reads_no_control_tokens(deepseek: Tokenizer, text: str) -> None:
    ids = deepseek.encode(text)
    assert deepseek.decode(ids) == text
    assert not set(ids) & {deepseek.special_id(name) for name in RESERVED}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    token = {"content": END, "__type": "AddedToken"}
    return Tokenizer.from_file(
        deepseek_like(
            tmp_path_factory.mktemp("deepseek"),
            tokenizer_class="LlamaTokenizerFast", bos_token=BEGIN, eos_token=token, pad_token=END,
        )
    )  # fmt: skip


def test_pad_never_equals_the_stop_token(deepseek: Tokenizer) -> None:
    assert deepseek.eos_id == deepseek.special_id(END)
    assert deepseek.pad_id == deepseek.special_id(PAD)
    assert deepseek.vocab_size == 320


def test_a_given_file_is_saved_as_it_was(tmp_path: Path) -> None:
    folder = deepseek_like(tmp_path, tokenizer_class="LlamaTokenizerFast", bos_token=BEGIN, eos_token=END)
    before = (folder / "tokenizer.json").read_bytes()
    (tmp_path / "copy").mkdir()
    Tokenizer.from_file(folder / "tokenizer.json").save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == before
    again = Tokenizer.from_file(tmp_path / "copy")
    assert again.encode_chat([{"role": "user", "content": "hi"}])[0] == again.bos_id


def test_files_that_cannot_be_used_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        Tokenizer.from_file(path)
    path.write_bytes(b'{"model": "\xff"}')
    with pytest.raises(UserError, match="invalid UTF-8 at byte 11"):
        Tokenizer.from_file(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="has no model"):
        Tokenizer.from_file(path)
    words = LibraryTokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(path))
    with pytest.raises(UserError, match="WordLevel without ByteLevel"):
        Tokenizer.from_file(path)
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    words.save(str(path))
    with pytest.raises(UserError, match="no begin and no end token"):
        Tokenizer.from_file(path)
    words.add_special_tokens(["<s>"])
    words.save(str(path))
    with pytest.raises(UserError, match="no end token"):
        Tokenizer.from_file(path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}', encoding="utf-8")
    with pytest.raises(UserError, match="eos_token '<stop>'"):
        Tokenizer.from_file(path)


def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="character 2"):
        tokenizer.encode("ab\ud83d")


@given(text=st.text(max_size=20), share=st.floats(0, 1))
def test_first_token_from_a_character(tokenizer: Tokenizer, text: str, share: float) -> None:
    character = int(share * len(text))
    [(ids, first)] = tokenizer.encode_batch_from([text], [character])
    assert ids == tokenizer.encode(text)
    bytes_before = [sum(tokenizer.byte_lengths()[i] for i in ids[:k]) for k in range(len(ids))]
    # The character that the k-th token starts in, counted from the bytes before it.
    starts = [sum(1 for byte in text.encode("utf-8")[: b + 1] if byte & 0xC0 != 0x80) - 1 for b in bytes_before]
    assert first == sum(1 for start in starts if start < character)


def test_ids_past_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([5000, *tokenizer.encode("ok")]) == "ok"
