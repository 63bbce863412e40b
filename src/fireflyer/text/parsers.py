"""A reply taken apart while it is written: thinking, answer, calls of tools.

In: pieces of the reply's text, cut anywhere. Out: deltas. All deltas of a kind, joined, are the same for every way of
cutting, because a decision falls only where no text that may follow could change it. Until then the undecided end is
held: the beginning of a mark, or the head of a call up to its first brace; what follows the head is handed on as it
comes. What looks like a call and is none stays in the answer, word for word.

Line breaks right after <think> and </think> belong to these marks; everything else is kept.
"""

import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fireflyer.text.dialects import Dialect, ToolFormat
from fireflyer.text.special_tokens import (
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEPARATOR,
)


@dataclass(frozen=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True)
class ContentDelta:
    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """Call number `index` of this reply begins; its arguments follow, perhaps none."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next piece of the arguments of call number `index`: JSON, as the model wrote it."""

    index: int
    text: str


Delta = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments


@dataclass
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass
class Reply:
    """A whole reply. "" where there was no thinking or no answer."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


# The head of a call, piece by piece: fixed text, or a run of one kind of character. The arguments' brace follows.
_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[\w.:/-]{1,128}")
_HeadPiece = str | re.Pattern[str]
_HEADS: Mapping[ToolFormat, tuple[_HeadPiece, ...]] = {
    "fenced": (TOOL_CALL_BEGIN, "function", TOOL_SEPARATOR, _SPACE, _NAME, _SPACE, "```json", _SPACE),
    "bare": (TOOL_CALL_BEGIN, _SPACE, _NAME, _SPACE, TOOL_SEPARATOR, _SPACE),
}

_CALL_MARKS = (TOOL_CALLS_BEGIN, TOOL_CALL_BEGIN, TOOL_CALLS_END)
_ARGUMENT_ENDS = (TOOL_CALL_END, TOOL_CALLS_END, TOOL_CALL_BEGIN)
_FENCE = "```"


class ReplyParser:
    """Parses one reply. Attributes: num_tool_calls, calls begun so far (finish_reason is "tool_calls" only if > 0)."""

    def __init__(self, dialect: Dialect, prompt_text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """`prompt_text`: the rendered prompt, control tokens in it, whose end says whether thinking is open; `tools`:
        those that the request offers. Where none is offered nothing is a call."""
        self.num_tool_calls = 0
        self._format: ToolFormat | None = dialect.tool_format if tools else None
        self._held = ""
        self._deltas: list[Delta] = []
        thinking = dialect.thinking_at_end(prompt_text)
        self._prompt_opened = thinking == "open"
        self._after_line_breaks = self._content
        self._step: Callable[[bool], bool] = self._content
        if thinking != "closed":
            self._step = self._opening
        elif dialect.thinks and prompt_text.rstrip("\r\n").endswith(THINK_END):
            self._step = self._line_breaks

    def push(self, text: str) -> list[Delta]:
        """The next piece of the reply; what it decides."""
        self._held += text
        return self._run(final=False)

    def finish(self) -> list[Delta]:
        """What was held when the reply ended."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Delta]:
        self._deltas = []
        while self._step(final):
            pass
        return self._deltas

    # Each step takes what is decided off the held text, and says whether another step can follow.

    def _opening(self, final: bool) -> bool:
        """The reply's very beginning, where the model may open thinking (or open it again)."""
        begun = self._held.lstrip()
        if begun.startswith(THINK_BEGIN):
            self._held = begun[len(THINK_BEGIN) :]
            self._after_line_breaks, self._step = self._reasoning, self._line_breaks
        elif THINK_BEGIN.startswith(begun) and not final:
            return False
        elif self._prompt_opened:
            self._after_line_breaks, self._step = self._reasoning, self._line_breaks
        else:
            self._step = self._content
        return True

    def _line_breaks(self, final: bool) -> bool:
        self._held = self._held.lstrip("\r\n")
        if not self._held:
            return False
        self._step = self._after_line_breaks
        return True

    def _reasoning(self, final: bool) -> bool:
        text, mark = self._until((THINK_END,), final)
        self._emit(ReasoningDelta(text))
        if mark:
            self._held = self._held[len(mark) :]
            self._after_line_breaks, self._step = self._content, self._line_breaks
        return bool(mark)

    def _content(self, final: bool) -> bool:
        text, mark = self._until((TOOL_CALLS_BEGIN, TOOL_CALL_BEGIN) if self._format else (), final)
        self._emit(ContentDelta(text))
        if mark:
            self._step = self._call_head
        return bool(mark)

    def _call_head(self, final: bool) -> bool:
        """At the mark of a call or of a block of calls."""
        assert self._format is not None
        first = TOOL_CALLS_BEGIN if self._held.startswith(TOOL_CALLS_BEGIN) else TOOL_CALL_BEGIN
        head = _HEADS[self._format]
        if first == TOOL_CALLS_BEGIN:
            head = (TOOL_CALLS_BEGIN, _SPACE, *head)
        end, name = _match_head(head, self._held)
        if end is None and not final:
            return False
        if end and name:
            self._emit(ToolCallStart(self.num_tool_calls, f"call_{secrets.token_hex(12)}", name))
            self.num_tool_calls += 1
            self._held = self._held[end:]
            self._step = self._arguments
        else:
            self._emit(ContentDelta(first))
            self._held = self._held[len(first) :]
            self._step = self._content
        return True

    def _arguments(self, final: bool) -> bool:
        """Inside the arguments, whose closing (white space, and the fence where there is one) is no part of them."""
        fenced = self._format == "fenced"
        place, mark = _first_mark(self._held, _ARGUMENT_ENDS)
        if mark:
            end = _closing(self._held[:place], fenced)
        elif final:
            place = len(self._held)
            end = _closing(self._held, fenced) if fenced and self._held.rstrip().endswith(_FENCE) else place
        else:
            place = end = _closing_begun(self._held[: _undecided(self._held, _ARGUMENT_ENDS)], fenced)
        self._emit(ToolCallArguments(self.num_tool_calls - 1, self._held[:end]))
        self._held = self._held[place + (len(mark) if mark == TOOL_CALL_END else 0) :]
        if mark:
            self._step = self._between_calls
        return bool(mark)

    def _between_calls(self, final: bool) -> bool:
        """After a call: white space, then another call, the end of the block, or text."""
        begun = self._held.lstrip()
        if final and not begun:
            self._held = ""
        if begun.startswith(TOOL_CALLS_END):
            self._held = begun[len(TOOL_CALLS_END) :]
            self._step = self._content
        elif begun.startswith((TOOL_CALL_BEGIN, TOOL_CALLS_BEGIN)):
            self._held = begun
            self._step = self._call_head
        elif not final and any(mark.startswith(begun) for mark in _CALL_MARKS):
            return False
        else:
            self._step = self._content
        return True

    def _until(self, marks: Sequence[str], final: bool) -> tuple[str, str]:
        """Take off the text before the first mark, or before what may become one; and the mark found, or ""."""
        place, mark = _first_mark(self._held, marks)
        if not mark:
            place = len(self._held) if final else _undecided(self._held, marks)
        text, self._held = self._held[:place], self._held[place:]
        return text, mark

    def _emit(self, delta: Delta) -> None:
        if isinstance(delta, ToolCallStart):
            self._deltas.append(delta)
            return
        if not delta.text:
            return
        last = self._deltas[-1] if self._deltas else None
        if isinstance(last, ReasoningDelta | ContentDelta | ToolCallArguments) and type(last) is type(delta):
            self._deltas[-1] = replace(last, text=last.text + delta.text)
        else:
            self._deltas.append(delta)


def parse_reply(
    dialect: Dialect, prompt_text: str, text: str, tools: Sequence[Mapping[str, Any]] | None = None
) -> Reply:
    """A whole reply taken apart, as ReplyParser does piece by piece."""
    parser = ReplyParser(dialect, prompt_text, tools)
    return gather([*parser.push(text), *parser.finish()])


def gather(deltas: Iterable[Delta]) -> Reply:
    """The reply that deltas, in their order, amount to."""
    reply = Reply()
    for delta in deltas:
        if isinstance(delta, ReasoningDelta):
            reply.reasoning += delta.text
        elif isinstance(delta, ContentDelta):
            reply.content += delta.text
        elif isinstance(delta, ToolCallStart):
            reply.tool_calls.append(ToolCall(delta.id, delta.name))
        else:
            reply.tool_calls[delta.index].arguments += delta.text
    return reply


def _match_head(head: Sequence[_HeadPiece], text: str) -> tuple[int | None, str | None]:
    """Where the head ends and the name in it; (0, None) if `text` does not begin with one, (None, None) if more text
    has to tell."""
    place, name = 0, None
    for piece in (*head, "{"):
        if isinstance(piece, str):
            there = text[place : place + len(piece)]
            if there != piece[: len(there)]:
                return 0, None
            if len(there) < len(piece):
                return None, None
            end = place + len(piece)
        else:
            match = piece.match(text, place)
            end = match.end() if match else place
            if end == len(text):
                return None, None
            if not match:
                return 0, None
            name = match.group() if piece is _NAME else name
        place = end
    return place - 1, name


def _first_mark(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """The place of the first mark and the mark; (-1, "") if there is none."""
    return min(((text.find(mark), mark) for mark in marks if mark in text), default=(-1, ""))


def _undecided(text: str, marks: Sequence[str]) -> int:
    """Where the longest end of `text` that is the beginning of a mark starts; len(text) if there is none."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for place in range(max(len(text) - longest, 0), len(text)):
        if any(mark.startswith(text[place:]) for mark in marks):
            return place
    return len(text)


def _closing(text: str, fenced: bool) -> int:
    """Where the closing of arguments starts that ends `text`."""
    bare = text.rstrip()
    return len(bare[: -len(_FENCE)].rstrip()) if fenced and bare.endswith(_FENCE) else len(bare)


def _closing_begun(text: str, fenced: bool) -> int:
    """The same for what may grow into a closing."""
    if fenced and text.endswith("`"):
        return len(text.rstrip("`").rstrip())
    return _closing(text, fenced)
