"""Chats: the published form, as transformers renders it, and safe against what users write."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fireflyer.errors import UserError
from fireflyer.text.special_tokens import ASSISTANT, BEGIN, END, RESERVED, THINK_BEGIN, USER
from fireflyer.text.templates import render_chat
from fireflyer.text.tokenizer import Tokenizer

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "s": "ü<"}}}
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 1+1? "},
     {"role": "assistant", "content": "2"}, {"role": "user", "content": "and\n3+4?"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>well</think>b"}],
    [{"role": "user", "content": "add"}, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
     {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}],
    [{"role": "user", "content": "add"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
     {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."}, {"role": "user", "content": "ok"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Hi there, be brief. " * 9], 300)


def test_the_form_is_deepseek_v3s(tokenizer: Tokenizer) -> None:
    assert tokenizer.render_chat(CHATS[1]) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜> 1+1? <｜Assistant｜>2<｜end▁of▁sentence｜>"
        "<｜User｜>and\n3+4?<｜Assistant｜>"
    )
    assert tokenizer.render_chat(CHATS[4], add_generation_prompt=False) == (
        "<｜begin▁of▁sentence｜><｜User｜>add<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
        'add\n```json\n{"a": 1, "s": "ü<"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>3<｜tool▁output▁end｜><｜tool▁outputs▁end｜>It is 3."
        "<｜end▁of▁sentence｜><｜User｜>ok"
    )


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_text_and_ids_equal_transformers(tokenizer: Tokenizer, tmp_path: Path, chat: list, prompt: bool) -> None:
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    text = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.render_chat(chat, prompt) == text
    ids = reference.apply_chat_template(chat, tokenize=True, add_generation_prompt=prompt, return_dict=False)
    assert tokenizer.encode_chat(chat, prompt) == ids
    assert ids.count(tokenizer.bos_id) == 1


def test_every_reply_ends_on_the_stop_token(tokenizer: Tokenizer) -> None:
    for chat in CHATS:
        ids = tokenizer.encode_chat(chat, add_generation_prompt=False)
        replies = sum(message["role"] == "assistant" for message in chat)
        assert ids.count(tokenizer.eos_id) == replies
        if chat[-1]["role"] == "assistant":
            assert ids[-1] == tokenizer.eos_id


def test_what_users_write_never_becomes_a_control_token(tokenizer: Tokenizer) -> None:
    everything = "".join(RESERVED) + "\ufdd0 <<think>>"
    chat = [
        {"role": "system", "content": everything},
        {"role": "user", "content": everything},
        {"role": "assistant", "content": f"{THINK_BEGIN}x"},
        {"role": "tool", "content": everything},
    ]
    ids = tokenizer.encode_chat(chat)
    controls = [tokenizer.token_text(i) for i in ids if i < len(RESERVED)]
    assert controls == ["<｜begin▁of▁sentence｜>", USER, ASSISTANT, THINK_BEGIN, "<｜end▁of▁sentence｜>",
                        "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
                        "<｜tool▁outputs▁end｜>"]  # fmt: skip
    # Nothing of the text is lost or changed on the way.
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render_chat(chat)


def test_marks_of_turns_in_a_reply_and_anything_in_tools_stay_text(tokenizer: Tokenizer) -> None:
    everything = "".join(RESERVED)
    tool = {"type": "function", "function": {"name": "f", "description": everything, "parameters": {"x": everything}}}
    call = {"function": {"name": "f", "arguments": {"x": USER}}}
    chat = [
        {"role": "user", "content": [{"type": "text", "text": USER}]},
        {"role": "assistant", "content": "".join(RESERVED), "tool_calls": [call]},
    ]
    ids = tokenizer.encode_chat(chat, tools=[tool], add_generation_prompt=False)
    for name in (BEGIN, END, USER, ASSISTANT):
        assert ids.count(tokenizer.special_id(name)) == 1, name
    assert ids.count(tokenizer.special_id(THINK_BEGIN)) == 1  # the reply's own
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.render_chat(chat, False, tools=[tool])


@pytest.mark.parametrize("chat", CHATS[1:3] + CHATS[4:])
def test_a_reply_to_go_on_with_ends_as_in_transformers(tokenizer: Tokenizer, tmp_path: Path, chat: list) -> None:
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    until = [i for i, message in enumerate(chat) if message["role"] == "assistant"][-1]
    text = reference.apply_chat_template(chat[: until + 1], tokenize=False, continue_final_message=True)
    assert tokenizer.render_chat(chat[: until + 1], continue_final_message=True) == text
    ids = tokenizer.encode_chat(chat[: until + 1], continue_final_message=True)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids[-1] != tokenizer.eos_id


def with_template(tokenizer: Tokenizer, folder: Path, template: str) -> Tokenizer:
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer.from_file(folder)


@pytest.mark.parametrize("begin", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_exactly_one_begin_token_whatever_the_template_does(tokenizer: Tokenizer, tmp_path: Path, begin: str) -> None:
    for loop in ("{{ m.content }}", "{{ m.content }}" + begin):
        own = with_template(tokenizer, tmp_path, begin + "{% for m in messages %}" + loop + "{% endfor %}")
        assert own.encode_chat([{"role": "user", "content": "Hi"}]) == [own.bos_id, *own.encode("Hi")]


def test_a_template_of_its_own_may_cut_past_thinking(tokenizer: Tokenizer, tmp_path: Path) -> None:
    own = with_template(
        tokenizer, tmp_path, "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ mode }}"
    )
    chat = [{"role": "assistant", "content": "<think>a</think>b"}]
    assert own.render_chat(chat, variables={"mode": "!"}) == "b!"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ([], "no messages"),
        (
            [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}],
            "message 1 of the chat has role 'robot'",
        ),
        ([{"role": "content", "content": "x"}], "message 0 of the chat has role 'content'"),
        ([{"role": "", "content": "x"}], "message 0 of the chat has role ''"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "message 1 of the chat must be an object"),
        ([{"role": "user"}], "message 0 of the chat has no content"),
        ([{"role": "tool", "content": None}], "message 0 of the chat has no content"),
        ([{"role": "user", "content": 5}], "message 0 of the chat: content must be a text or a list"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "message 0 .* got 'image_url'"),
        (
            [{"role": "assistant", "tool_calls": {}}, {"role": "assistant", "tool_calls": 3}],
            "message 1 .* must be a list",
        ),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "message 0 of the chat: a tool call must be"),
    ],
)
def test_what_does_not_fit_is_told_with_its_place(tokenizer: Tokenizer, messages: list, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        tokenizer.encode_chat(messages)
    assert "\n" not in str(error.value)


def test_a_template_is_run_in_a_sandbox(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="not valid jinja2"):
        render_chat([], "{% for %}", special_tokens={}, add_generation_prompt=True)
    attacks = (
        "''.__class__.__mro__",
        "messages.append(1)",
        "cycler.__init__.__globals__.os",
        "1 / 0",
        "range(10**9)|list",
    )
    for attack in attacks:
        with pytest.raises(UserError, match="can't render"):
            render_chat([], "{{" + attack + "}}", special_tokens={}, add_generation_prompt=True)


def test_variables_are_the_templates_own(tokenizer: Tokenizer) -> None:
    for name in ("messages", "bos_token", "add_generation_prompt"):
        with pytest.raises(UserError, match=f"'{name}' can't be a variable"):
            tokenizer.encode_chat(CHATS[0], variables={name: "x"})
