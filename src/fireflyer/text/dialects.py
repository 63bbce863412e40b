"""How a checkpoint talks: its thinking marks and its form of tool calls, read off its own chat template.

In: the template's text. Out: a Dialect, which tells a prompt that ends inside thinking from one that does not, and
names the form in which tools are called. Nothing goes by file names: what counts is what the template renders
(DeepSeek-V3 report, section 4.1 for the tokens; the model cards of R1 and V3.1 for thinking and tools).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fireflyer.errors import UserError
from fireflyer.text.special_tokens import (
    ASSISTANT,
    END,
    THINK_BEGIN,
    THINK_END,
    TOOL_CALL_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_OUTPUTS_END,
    TOOL_SEPARATOR,
    USER,
)
from fireflyer.text.templates import Message, render_chat

# fenced: function<sep>name, then the arguments in a ```json block (V3, R1); bare: name<sep>arguments (V3.1).
ToolFormat = Literal["fenced", "bare"]

# open: the prompt ended inside thinking; unopened: the reply may open it; closed: it may not.
Thinking = Literal["open", "unopened", "closed"]

_TURN_MARKS = (ASSISTANT, USER, END, TOOL_OUTPUT_END, TOOL_OUTPUTS_END)


@dataclass(frozen=True)
class Dialect:
    """`chat_template`: the template that was looked at; `thinks`: whether replies may hold <think>; `tool_format`: None
    where the template knows no form of tool calls."""

    name: Literal["v2", "v3", "r1", "v3.1", "plain"]
    chat_template: str | None
    thinks: bool
    tool_format: ToolFormat | None

    def thinking_at_end(self, prompt_text: str) -> Thinking:
        """Where a reply to this prompt begins, as the prompt (its control tokens in it) itself says."""
        if not self.thinks:
            return "closed"
        if self.name == "plain":  # whose turn marks are unknown
            tail = prompt_text.rstrip()[-len(THINK_END) :]
        else:
            place, mark = max((prompt_text.rfind(mark), mark) for mark in _TURN_MARKS)
            if mark == USER and place >= 0:
                return "unopened"
            tail = prompt_text[place + len(mark) :] if place >= 0 else prompt_text
        opened, closed = tail.rfind(THINK_BEGIN), tail.rfind(THINK_END)
        if opened > closed:
            return "open"
        begun = closed >= 0 or (self.name != "plain" and bool(tail.strip()))
        return "closed" if begun else "unopened"

    def starts_in_thinking(self, prompt_text: str) -> bool:
        """Whether a reply to this prompt begins inside thinking."""
        return self.thinking_at_end(prompt_text) == "open"


@lru_cache(maxsize=16)
def detect_dialect(template: str | None) -> Dialect:
    """The dialect of a checkpoint's chat template; "plain" for None and for what is not DeepSeek's."""
    if template is None:
        return Dialect("plain", None, thinks=False, tool_format=None)
    generation = _rendered(template, [{"role": "user", "content": "a"}], add_generation_prompt=True)
    if ASSISTANT not in generation:
        if "Assistant:" in generation:
            return Dialect("v2", template, thinks=False, tool_format=None)
        return Dialect("plain", template, thinks=THINK_END in template, tool_format=None)
    call = _rendered_call(template)
    if f"{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}" in call:
        bare = False
    elif f"{TOOL_CALL_BEGIN}lookup{TOOL_SEPARATOR}" in call:
        bare = True
    else:  # no form of calls at all: V3.1 is known by closing what it does not think
        bare = generation.rstrip().endswith(THINK_END)
    if bare:
        return Dialect("v3.1", template, thinks=True, tool_format="bare")
    forced = generation.rstrip().endswith(THINK_BEGIN)
    return Dialect("r1" if forced else "v3", template, thinks=True, tool_format="fenced")


def _rendered(template: str, messages: list[Message], add_generation_prompt: bool) -> str:
    """What the template makes of a conversation; "" if it can't take it."""
    names = {"bos_token": "", "eos_token": END, "pad_token": ""}
    try:
        return render_chat(messages, template, special_tokens=names, add_generation_prompt=add_generation_prompt)
    except UserError:
        return ""


def _rendered_call(template: str) -> str:
    arguments: list[str | Mapping[str, Any]] = ["{}", {}]  # some templates want text, some an object
    calls = [{"id": "call_0", "type": "function", "function": {"name": "lookup", "arguments": a}} for a in arguments]
    return "".join(
        _rendered(
            template,
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
            add_generation_prompt=False,
        )
        for call in calls
    )
