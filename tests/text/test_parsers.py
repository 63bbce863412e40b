"""Replies taken apart: the same for every way of cutting the stream, and what the texts say by hand."""

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.text.dialects import Dialect, detect_dialect
from fireflyer.text.parsers import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    Reply,
    ReplyParser,
    ToolCallArguments,
    ToolCallStart,
    gather,
    parse_reply,
)
from fireflyer.text.special_tokens import (
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEPARATOR,
)
from fireflyer.text.templates import BUILT_IN

V2, V3, V31 = (detect_dialect(BUILT_IN[name]) for name in ("v2", "v3", "v3.1"))
CHATML = "{{ '<|im_start|>' }}{% if add_generation_prompt %}<think>{% endif %}</think>"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SAY, THINK, SAID = (
    "<｜User｜>a<｜Assistant｜>",
    "<｜User｜>a<｜Assistant｜><think>\n",
    "<｜User｜>a<｜Assistant｜></think>",
)


def block(*calls: str) -> str:
    return TOOL_CALLS_BEGIN + "\n".join(calls) + TOOL_CALLS_END


def fenced(name: str, arguments: str) -> str:
    return f"{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}{name}\n```json\n{arguments}\n```{TOOL_CALL_END}"


def bare(name: str, arguments: str) -> str:
    return f"{TOOL_CALL_BEGIN}{name}{TOOL_SEPARATOR}{arguments}{TOOL_CALL_END}"


NO_HEAD = f"{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}f\n{{}}{TOOL_CALL_END}{TOOL_CALLS_END}"

# dialect, end of the prompt, reply; then thinking, answer, calls.
REPLIES: list[tuple[Dialect, str, str, str, str, list[tuple[str, str]]]] = [
    # thinking: opened by the prompt, by the model, by both; closed by the prompt; not closed in time; in a later place
    (V3, THINK, "So <｜ 1 < 2</thin.\n</think>\n\n</think>Yes", "So <｜ 1 < 2</thin.\n", "</think>Yes", []),
    (V3, SAY, " \n<think>\nhm</think>\r\nYes", "hm", "Yes", []),
    (V3, THINK, "<think>hm</think>Yes", "hm", "Yes", []),
    (V31, SAID, "\n<think>hm</think>", "", "<think>hm</think>", []),
    (V31, THINK.rstrip(), "no end of it </thin", "no end of it </thin", "", []),
    (V3, THINK, f"a{block(fenced('f', '{}'))}", f"a{block(fenced('f', '{}'))}", "", []),
    (V3, SAY, "\n <think", "", "\n <think", []),
    (V3, SAY, "Say <think>x</think>", "", "Say <think>x</think>", []),
    (V2, SAY, f"<think>x</think>{block(fenced('f', '{}'))}", "", f"<think>x</think>{block(fenced('f', '{}'))}", []),
    # calls: one, with text around it; two; fences and marks within; cut off; without the marks of the block
    (V3, SAY, f"Let me.\n\n{block(fenced('f', '{}'))} 好", "", "Let me.\n\n 好", [("f", "{}")]),
    (V3, SAY, block(fenced("f", '{"a": "`"}'), fenced("a.b-c", "{\n}")), "", "",
     [("f", '{"a": "`"}'), ("a.b-c", "{\n}")]),
    (V3, SAY, block(fenced("f", '{"a": "```\\n```", "🦋": "} ```"}```')), "", "",
     [("f", '{"a": "```\\n```", "🦋": "} ```"}```')]),
    (V3, SAY, fenced("f", '{"a"}')[: -len(TOOL_CALL_END)], "", "", [("f", '{"a"}')]),
    (V3, SAY, fenced("f", '{"a ')[: -len(TOOL_CALL_END) - 4], "", "", [("f", '{"a ')]),
    (V31, SAY, bare("f", "{}```"), "", "", [("f", "{}```")]),
    (V3, SAY, fenced("f", "{}")[: -len(TOOL_CALL_END)] + TOOL_CALLS_END + "x", "", "x", [("f", "{}")]),
    (V3, THINK, f"h</think>{fenced('f', '{')}\n", "h", "", [("f", "{")]),
    (V31, SAY, block(bare("f", '{"a": 1} '), bare("g", "{}")).replace("\n", ""), "", "",
     [("f", '{"a": 1}'), ("g", "{}")]),
    (V31, SAID, bare("f", "{```")[:-5], "", "", [("f", "{```" + TOOL_CALL_END[:-5])]),
    (V31, SAY, bare("f", "{").replace(TOOL_CALL_END, "") + bare("g", "{}") + "\n\nx", "", "\n\nx",
     [("f", "{"), ("g", "{}")]),
    # what looks like a call and is none
    (V3, SAY, NO_HEAD, "", NO_HEAD, []),
    (V3, SAY, block(bare("f", "{}")), "", block(bare("f", "{}")), []),
    (V31, SAY, block(fenced("f", "{}")), "", block(fenced("f", "{}")), []),
    (V31, SAY, bare("f g", "{}") + bare("f", "[]"), "", bare("f g", "{}") + bare("f", "[]"), []),
    (V31, SAY, f"{TOOL_CALLS_BEGIN} {TOOL_CALL_BEGIN}f", "", f"{TOOL_CALLS_BEGIN} {TOOL_CALL_BEGIN}f", []),
    (V31, SAY, f"{TOOL_CALLS_BEGIN}no {bare('f', '{}')}{TOOL_CALLS_END}", "", f"{TOOL_CALLS_BEGIN}no ", [("f", "{}")]),
    (V31, SAY, f"{bare('f', '{}')} <｜tool▁call", "", " <｜tool▁call", [("f", "{}")]),
]  # fmt: skip


def plain(reply: Reply) -> tuple[str, str, list[tuple[str, str]]]:
    return reply.reasoning, reply.content, [(call.name, call.arguments) for call in reply.tool_calls]


def in_pieces(dialect: Dialect, prompt: str, pieces: Iterable[str]) -> tuple[str, str, list[tuple[str, str]]]:
    parser = ReplyParser(dialect, prompt, TOOLS)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    reply = gather(deltas)
    assert parser.num_tool_calls == len(reply.tool_calls)
    return plain(reply)


def cut(text: str, places: Iterable[int]) -> list[str]:
    edges = [0, *sorted(places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("case", REPLIES, ids=lambda case: case[2][:30])
def test_every_way_of_cutting_once_or_twice_gives_the_same(case: tuple) -> None:
    dialect, prompt, text, *expected = case
    assert plain(parse_reply(dialect, prompt, text, TOOLS)) == tuple(expected)
    assert in_pieces(dialect, prompt, text) == tuple(expected)  # character by character
    for places in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert in_pieces(dialect, prompt, cut(text, places)) == tuple(expected), places


MARKS = [THINK_BEGIN, THINK_END, TOOL_CALLS_BEGIN, TOOL_CALLS_END, TOOL_CALL_BEGIN, TOOL_CALL_END, TOOL_SEPARATOR]
FRAGMENTS = st.one_of(
    st.sampled_from([*MARKS, "function", "f", "```json", "```", "`", "\n", " ", "{", '{"a": "', '"}', "}", "😀中"]),
    st.sampled_from(MARKS).flatmap(lambda mark: st.integers(1, len(mark) - 1).map(lambda end: mark[:end])),
    st.sampled_from([fenced("f", '{"b": 2}'), bare("g", "{}"), block(fenced("f", "{ }")), block(bare("g", "{}"))]),
    st.text(max_size=4),
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)


@settings(max_examples=500, deadline=None)
@given(dialect=st.sampled_from([V3, V31]), prompt=st.sampled_from([SAY, THINK, SAID]), text=TEXTS, data=st.data())
def test_any_text_cut_anywhere_gives_the_same(dialect: Dialect, prompt: str, text: str, data: st.DataObject) -> None:
    whole = plain(parse_reply(dialect, prompt, text, TOOLS))
    places = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    assert in_pieces(dialect, prompt, cut(text, places)) == whole
    assert in_pieces(dialect, prompt, text) == whole
    # Words, unlike marks and the white space around them, are neither lost nor made.
    said = "".join([*whole[:2], *("".join(call) for call in whole[2])])
    assert said.count("中") == text.count("中")


def pushed(parser: ReplyParser, *texts: str) -> list[Delta]:
    return [delta for text in texts for delta in parser.push(text)]


def test_nothing_is_held_but_the_beginning_of_a_mark() -> None:
    parser = ReplyParser(V31, SAID, TOOLS)
    assert pushed(parser, "Hel") == [ContentDelta("Hel")]
    assert pushed(parser, "lo \n\n 1 <") == [ContentDelta("lo \n\n 1 ")]
    assert pushed(parser, " 2 `") == [ContentDelta("< 2 `")]
    assert pushed(parser, "<｜tool▁calls▁begin") == []
    assert pushed(parser, "s") == [ContentDelta("<｜tool▁calls▁begins")]
    parser = ReplyParser(V3, THINK, TOOLS)
    assert pushed(parser, "hm ", "</th") == [ReasoningDelta("hm ")]
    assert parser.finish() == [ReasoningDelta("</th")]
    parser = ReplyParser(V3, SAY)
    assert pushed(parser, f"{TOOL_CALLS_BEGIN[:-1]}") == [ContentDelta(TOOL_CALLS_BEGIN[:-1])]  # no tools, no marks


def test_arguments_are_handed_on_as_they_come() -> None:
    parser = ReplyParser(V3, SAY, TOOLS)
    assert pushed(parser, f"{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}f\n```json\n") == []
    start, first = pushed(parser, '{"a": ')
    assert isinstance(start, ToolCallStart)
    assert (start.index, start.name, start.id[:5], len(start.id)) == (0, "f", "call_", 29)
    assert first == ToolCallArguments(0, '{"a":')
    assert pushed(parser, '"``') == [ToolCallArguments(0, ' "')]
    assert pushed(parser, '` x"}') == [ToolCallArguments(0, '``` x"}')]
    assert pushed(parser, "\n```", TOOL_CALL_END, "\n", TOOL_CALLS_END) == []
    assert parser.finish() == []


def test_ids_of_calls_differ() -> None:
    reply = parse_reply(V31, SAY, block(bare("f", "{}"), bare("f", "{}")), TOOLS)
    assert len({call.id for call in reply.tool_calls}) == 2


def test_without_tools_in_the_request_nothing_is_a_call() -> None:
    text = block(fenced("f", "{}"))
    for tools in (None, []):
        assert plain(parse_reply(V3, SAY, text, tools)) == ("", text, [])


def test_a_reply_of_a_plain_dialect_is_all_answer_but_its_thinking() -> None:
    chatml = detect_dialect(CHATML)
    assert chatml.name == "plain"
    text = f"hm</think>\n\nYes{block(fenced('f', '{}'))}"
    assert plain(parse_reply(chatml, "<think>\n", text, TOOLS)) == ("hm", f"Yes{block(fenced('f', '{}'))}", [])
    assert plain(parse_reply(detect_dialect(None), "", text, TOOLS)) == ("", text, [])


def test_a_long_reply_is_parsed_in_little_time() -> None:
    """White space without end, a model's usual way to be stuck in arguments, costs no more than linear work a piece."""
    text = bare("f", "{" + " " * 20_000 + "}" + " " * 20_000)
    parser = ReplyParser(V31, SAY, TOOLS)
    for piece in cut(text, range(0, len(text), 40)):
        parser.push(piece)
    assert parser.finish() == []
