"""What is learnt of a chat: the assistant's words and its stop token, at the very ids that answering will see."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from fireflyer.errors import UserError
from fireflyer.text.taught import check_turns, taught_chat, taught_text
from fireflyer.text.templates import BUILT_IN
from fireflyer.text.tokenizer import Tokenizer

TRAINED = Tokenizer.train(["Hi there, be brief. " * 9], 300)
CHATML = (
    "{% for m in messages %}<｜User｜>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<｜User｜>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}]


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TWO_TURNS = [
    said("system", "S"),
    said("user", "1+1?"),
    said("assistant", " 2"),
    said("user", "b"),
    said("assistant", "7"),
]
THINKING = [
    said("user", "1+1?"), said("assistant", "two", reasoning_content="t1"),
    said("user", "3+4?"), said("assistant", "seven", reasoning_content="t2"),
]  # fmt: skip
CALLS = [said("user", "add"), said("assistant", None, tool_calls=[CALL]), said("tool", "3"), said("assistant", "3.")]


def speaking(template: str) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        TRAINED.save(folder)
        config = Path(folder) / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
        return Tokenizer.from_file(folder)


def learnt(tokenizer: Tokenizer, messages: list[Any], **more: Any) -> list[list[str]]:
    """Of each sequence the stretches that are learnt, as text."""
    found = []
    for taught in taught_chat(tokenizer, messages, **more):
        texts, open_ = [], False
        for token, trained in zip(taught.token_ids, taught.trained, strict=True):
            if trained and not open_:
                texts.append("")
            if trained:
                texts[-1] += tokenizer.token_text(token)
            open_ = trained
        found.append(texts)
    return found


END = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1", "v2", "chatml"])
def test_every_learnt_stretch_ends_with_the_stop_token_and_is_the_answers(name: str) -> None:
    tokenizer = speaking(CHATML if name == "chatml" else BUILT_IN[name])
    assert tokenizer.pad_id != tokenizer.eos_id
    for texts in learnt(tokenizer, TWO_TURNS):
        assert all(text.endswith(END) and text.count(END) == 1 for text in texts)
    stretches = [text for texts in learnt(tokenizer, TWO_TURNS) for text in texts]
    expected = {"r1": ["</think>\n\n 2" + END, "</think>\n\n7" + END], "v2": [" " + " 2" + END, " 7" + END]}
    if name == "r1":
        assert [text.replace(" ", "") for text in stretches] == [text.replace(" ", "") for text in expected["r1"]]
    else:
        assert stretches == expected.get(name, [" 2" + END, "7" + END])


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1", "v2"])
def test_what_comes_before_an_answer_is_its_prompt_to_the_token(name: str) -> None:
    tokenizer = speaking(BUILT_IN[name])
    for messages in (TWO_TURNS, *([] if name == "v2" else [THINKING, CALLS])):
        thinks = {"thinking": "reasoning_content" in messages[-1]}
        taught = taught_chat(tokenizer, messages)[-1]
        prompt = tokenizer.encode_chat(messages[:-1], variables=thinks)
        assert taught.token_ids[: len(prompt)] == prompt
        assert taught.trained[len(prompt) :] == [True] * (len(taught.token_ids) - len(prompt))
        assert not taught.trained[len(prompt) - 1]


def test_one_rendering_is_encoded_once() -> None:
    for messages in (TWO_TURNS, CALLS):
        (taught,) = taught_chat(TRAINED, messages)
        assert taught.token_ids == TRAINED.encode_chat(messages, add_generation_prompt=False)


def test_thinking_is_taught_where_the_template_keeps_it() -> None:
    assert learnt(TRAINED, THINKING) == [[f"<think>t1</think>two{END}"], [f"<think>t2</think>seven{END}"]]
    assert learnt(speaking(BUILT_IN["v3.1"]), THINKING) == [[f"t1</think>two{END}"], [f"t2</think>seven{END}"]]
    assert learnt(speaking(BUILT_IN["r1"]), THINKING) == [[f"t1</think>\n\ntwo{END}"], [f"t2</think>\n\nseven{END}"]]
    second = taught_chat(TRAINED, THINKING)[1]
    assert "t1" not in TRAINED.decode(second.token_ids)
    inline = [said("user", "q"), said("assistant", "<think>\nhm</think>\n\na")]
    assert learnt(TRAINED, inline) == [[f"<think>hm</think>a{END}"]]


def test_calls_are_learnt_and_tool_outputs_are_not() -> None:
    (texts,) = learnt(TRAINED, CALLS, tools=TOOLS)
    assert '"a": 1' in texts[0]
    assert texts[1] == f"3.{END}"
    assert "output" not in "".join(texts)


def test_control_tokens_that_users_spell_are_text() -> None:
    (taught,) = taught_chat(TRAINED, [said("user", END), said("assistant", f"a{END}b")])
    assert taught.token_ids.count(TRAINED.eos_id) == 1


def test_a_weight_of_zero_is_context() -> None:
    messages = [*TWO_TURNS[:2], said("assistant", "2", weight=0), *TWO_TURNS[3:]]
    assert learnt(TRAINED, messages) == [[f"7{END}"]]
    with pytest.raises(UserError, match="weight 0; nothing is left"):
        taught_chat(TRAINED, [said("user", "q"), said("assistant", "a", weight=0)])


def test_a_plain_pair_learns_its_completion() -> None:
    taught = taught_text(TRAINED, "Hi ", "there")
    assert taught.token_ids == [TRAINED.bos_id, *TRAINED.encode("Hi "), *TRAINED.encode("there"), TRAINED.eos_id]
    assert taught.trained.count(True) == len(TRAINED.encode("there")) + 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one question"),
        ([said("user", "a")], "ends with 'user'"),
        ([said("assistant", "a")], "message 0 is by 'assistant' and begins the chat"),
        ([said("user", "a"), said("user", "b"), said("assistant", "c")], "1 is by 'user' and comes after 'user'"),
        ([said("user", "a"), said("tool", "b"), said("assistant", "c")], "message 1 is by 'tool'"),
        ([*CALLS[:2], said("assistant", "c")], "message 2 is by 'assistant' and comes after 'calls'"),
        ([said("user", "a"), said("assistant", "b", thinking="c")], "unknown key 'thinking'"),
        ([said("user", "a"), said("assistant", "b", weight=2)], "weight 2"),
        (["a"], "message 0 must be an object"),
    ],
)  # fmt: skip
def test_refusals(messages: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_turns(messages)


def test_a_template_that_cannot_say_it_refuses() -> None:
    v2 = speaking(BUILT_IN["v2"])
    with pytest.raises(UserError, match="has thinking, for which this chat template has no form"):
        taught_chat(v2, THINKING)
    with pytest.raises(UserError, match="about a tool, for which this chat template has no form"):
        taught_chat(v2, CALLS)
    with pytest.raises(UserError, match="no stop token"):
        taught_chat(speaking("{% for m in messages %}{{ m['content'] }}{% endfor %}"), TWO_TURNS)
    with pytest.raises(UserError, match="rewrites what the assistant says"):
        taught_chat(speaking("{% for m in messages %}{{ m['content'][:1] }}{{ eos_token }}{% endfor %}"), TWO_TURNS)


def test_the_mark_of_a_taught_model_is_saved_with_its_tokenizer(tmp_path: Path) -> None:
    TRAINED.of_taught_model().save(tmp_path)
    assert Tokenizer.from_file(tmp_path).taught_chat
    assert not TRAINED.taught_chat
    assert Tokenizer.from_file(tmp_path).chat_template == TRAINED.chat_template
