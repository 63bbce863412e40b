"""How a checkpoint talks: its thinking marks and its form of tool calls, read off its own chat template.

In: the template's text. Out: a Dialect, which tells a prompt that ends inside thinking from one that does not, and
names the form in which tools are called. Nothing goes by file names: what counts is what the template renders
(DeepSeek-V3 report, section 4.1 for the tokens; the model cards of R1 and V3.1 for thinking and tools).
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

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
from fireflyer.text.templates import Message, Tool, render_chat

# fenced: function<sep>name, then the arguments in a ```json block (V3, R1); bare: name<sep>arguments (V3.1).
ToolFormat = Literal["fenced", "bare"]

# open: the prompt ended inside thinking; unopened: the reply may open it; closed: it may not.
Thinking = Literal["open", "unopened", "closed"]

_TURN_MARKS = (ASSISTANT, USER, END, TOOL_OUTPUT_END, TOOL_OUTPUTS_END)


@dataclass(frozen=True)
class Dialect:
    """`chat_template`: the template that was looked at (None: no chats). `thinks`: replies may hold <think>.
    `tool_format`: None where the template knows no form of tool calls. `lists_tools`: the template itself tells the
    model of its tools. `text_arguments`: it wants the arguments of past calls as text, else as an object.
    `no_content`: what it takes as the content of a message that has calls alone, None or ""."""

    name: Literal["v2", "v3", "r1", "v3.1", "plain"]
    chat_template: str | None = field(repr=False)
    thinks: bool
    tool_format: ToolFormat | None
    lists_tools: bool = False
    text_arguments: bool = True
    no_content: str | None = None

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
    prompt = _rendered(template, _QUESTION, add_generation_prompt=True)
    calls = {
        (content, as_text): _rendered(template, [*_QUESTION, _call(content, as_text)])
        for content in (None, "")
        for as_text in (True, False)
    }
    fitting = [form for form, text in calls.items() if '{"a": 1}' in text and "None" not in text]
    no_content, text_arguments = fitting[0] if fitting else (None, True)
    name = _name(prompt, calls[no_content, text_arguments])
    tool_formats: dict[str, ToolFormat] = {"v3": "fenced", "r1": "fenced", "v3.1": "bare"}
    return Dialect(
        name,
        template,
        thinks=name in tool_formats or (name == "plain" and THINK_END in template),
        tool_format=tool_formats.get(name),
        lists_tools="lookup" in _rendered(template, _QUESTION, tools=[_TOOL]),
        text_arguments=text_arguments,
        no_content=no_content,
    )


_QUESTION: list[Message] = [{"role": "user", "content": "a"}]
_TOOL = {"type": "function", "function": {"name": "lookup", "description": "b", "parameters": {"type": "object"}}}


def _name(prompt: str, calls: str) -> Literal["v2", "v3", "r1", "v3.1", "plain"]:
    """`prompt`: a question with a generation prompt after it; `calls`: calls of `lookup`, as far as they rendered."""
    if ASSISTANT not in prompt:
        return "v2" if prompt.endswith("\n\nAssistant:") else "plain"
    if f"{TOOL_CALL_BEGIN}lookup{TOOL_SEPARATOR}" in calls:
        return "v3.1"
    fenced = f"{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}lookup" in calls
    if prompt.endswith(THINK_END) and not fenced:  # closing what was not thought is V3.1's way
        return "v3.1"
    return "r1" if prompt.rstrip().endswith(THINK_BEGIN) else "v3"


def _call(content: str | None, as_text: bool) -> Message:
    arguments = '{"a": 1}' if as_text else {"a": 1}
    call = {"id": "call_0", "type": "function", "function": {"name": "lookup", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def _rendered(
    template: str, messages: list[Message], add_generation_prompt: bool = False, tools: list[Tool] | None = None
) -> str:
    """What the template makes of a conversation; "" if it can't take it."""
    names = {"bos_token": "", "eos_token": END, "pad_token": ""}
    try:
        return render_chat(
            messages, template, special_tokens=names, add_generation_prompt=add_generation_prompt, tools=tools
        )
    except UserError:
        return ""
