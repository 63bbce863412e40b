"""What a chat is made of, checked and made plain before a template sees it.

In: messages and tools as the OpenAI API has them, from a client or a file. Out: the same with content as one text,
calls in the form that the template at hand takes, and control tokens that others spelt out broken, so that they stay
text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fireflyer.errors import UserError
from fireflyer.text.dialects import Dialect
from fireflyer.text.special_tokens import (
    ASSISTANT,
    TOOL_OUTPUT_BEGIN,
    TOOL_OUTPUT_END,
    TOOL_OUTPUTS_BEGIN,
    TOOL_OUTPUTS_END,
    USER,
)
from fireflyer.text.templates import Message, Tool

_ROLES = ("system", "user", "assistant", "tool")

# No reply of a model holds these; its thinking and its calls are meant.
_TURN_TOKENS = (USER, ASSISTANT, TOOL_OUTPUTS_BEGIN, TOOL_OUTPUTS_END, TOOL_OUTPUT_BEGIN, TOOL_OUTPUT_END)


def checked_messages(messages: Sequence[Message], dialect: Dialect) -> list[dict[str, Any]]:
    """Messages as the dialect's template reads them. Roles beyond the usual are let through where the template names
    them. Raises UserError."""
    template = dialect.chat_template or ""
    if not messages:
        raise UserError("the chat has no messages; give at least one")
    checked = []
    for index, message in enumerate(messages):
        where = f"message {index} of the chat"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'{where} must be an object with "role" and "content", got {message!r:.80}')
        role = message["role"]
        named = re.search(rf"""(==|\bin\s*[\[(]|,)\s*['"]{re.escape(role)}['"]""", template)
        if role == "developer" and not named:  # the API's newer name for it
            role = "system"
        elif role not in _ROLES and not named:
            raise UserError(f"{where} has role {role!r:.80}, which is not one of {', '.join(_ROLES)}")
        if (role == "tool" or message.get("tool_calls")) and "tool" not in template:
            raise UserError(f"{where} is about a tool, for which this chat template has no form; leave tools out")
        checked.append({**message, "role": role, **_said(message, role, where, dialect)})
        if not checked[-1]["tool_calls"]:
            del checked[-1]["tool_calls"]  # published templates ask whether the key is there
    return checked


def checked_tools(tools: Sequence[Tool]) -> list[Tool]:
    """Tools that have what a template may read. Raises UserError."""
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(
                f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}, got {tool!r:.80}'
            )
    return list(tools)


def shield(
    messages: Sequence[Message], tools: Sequence[Tool], control_tokens: Iterable[str], end_tokens: Iterable[str]
) -> tuple[list[Any], list[Any], str]:
    """Break control tokens that others wrote into their messages, so that only the template's own ones count.

    Returns messages and tools with a mark inside each such token, and the mark: Unicode noncharacters found nowhere
    else in them, to be taken out again of the plain text between control tokens. In the assistant's own replies only
    `end_tokens` (of a text) and the marks of turns are broken: their thinking and tool tokens are meant.
    """
    everything = json.dumps([messages, tools], ensure_ascii=False, default=str)
    mark = "\ufdd0"
    while mark in everything:
        mark += mark
    breaking_all = _breaker(list(control_tokens), mark)
    breaking_turns = _breaker([*end_tokens, *_TURN_TOKENS], mark)

    def shielded(message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        broken = breaking_turns if message.get("role") == "assistant" else breaking_all
        return {key: value if key == "role" else broken(value) for key, value in message.items()}

    return [shielded(message) for message in messages], [breaking_all(tool) for tool in tools], mark


def _breaker(tokens: Sequence[str], mark: str) -> Callable[[Any], Any]:
    def broken(value: Any) -> Any:
        if isinstance(value, str):
            for token in tokens:
                value = value.replace(token, token[0] + mark + token[1:])
            return value
        if isinstance(value, Mapping):
            return {key: broken(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [broken(item) for item in value]
        return value

    return broken


def _said(message: Message, role: str, where: str, dialect: Dialect) -> dict[str, Any]:
    """Content and calls of one message."""
    content = message_text(message.get("content"), where)
    calls = message.get("tool_calls") or []
    if content is None and role != "assistant":
        raise UserError(f"{where} has no content")
    if not isinstance(calls, (list, tuple)):
        raise UserError(f"{where}: tool_calls must be a list, got {calls!r:.80}")
    calls = [_call(call, where, dialect.text_arguments) for call in calls]
    return {"content": content or (dialect.no_content if calls else ""), "tool_calls": calls}


def message_text(content: Any, where: str) -> str | None:
    """One text of a content that may be a list of parts. Raises UserError."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise UserError(f"{where}: content must be a text or a list of parts, got {content!r:.80}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else part
            raise UserError(f'{where}: only parts {{"type": "text", "text": ...}} can be read, got {kind!r:.80}')
        texts.append(part["text"])
    return "\n".join(texts)


def _call(call: Any, where: str, text_arguments: bool) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f'{where}: a tool call must be {{"function": {{"name": ..., "arguments": ...}}}}, got {call!r:.80}'
        )
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if text_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not text_arguments and isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # a call that was cut off is shown as it was written
            arguments = json.loads(arguments or "{}")
    return {**call, "type": call.get("type") or "function", "function": {**function, "arguments": arguments}}
