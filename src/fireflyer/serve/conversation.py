"""From a chat request to a prompt. In: messages, tools, switches. Out: token ids, and how the reply is to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fireflyer.serve.errors import ApiError
from fireflyer.serve.protocol import ChatCompletionRequest, NamedTool
from fireflyer.serve.service import Service
from fireflyer.text.dialects import Dialect, detect_dialect
from fireflyer.text.parsers import ReplyParser
from fireflyer.text.tool_grammar import tool_grammar


@dataclass(frozen=True)
class Conversation:
    """`prompt`: token ids. `tools`: those that may be called. `response_format`: what the reply is held to, or None."""

    prompt: list[int]
    tools: list[dict[str, Any]]
    response_format: dict[str, Any] | None
    dialect: Dialect
    prompt_text: str

    def parser(self) -> ReplyParser:
        """A new one for each answer."""
        return ReplyParser(self.dialect, self.prompt_text, self.tools)


def read_conversation(service: Service, body: ChatCompletionRequest) -> Conversation:
    """Raises ApiError, UserError."""
    tokenizer = service.tokenizer_for("a chat")
    dialect = detect_dialect(tokenizer.chat_template)
    tools = [] if body.tool_choice == "none" else [tool.model_dump(exclude_unset=True) for tool in body.tools]
    if tools and dialect.tool_format is None:
        message = "this checkpoint's chat template has no form for tools; leave tools out, or set tool_choice to none"
        raise ApiError(400, message, param="tools", code="unsupported_tools")
    prompt = tokenizer.encode_chat(
        [message.model_dump(exclude_none=True) for message in body.messages],
        add_generation_prompt=body.add_generation_prompt and not body.continue_final_message,
        continue_final_message=body.continue_final_message,
        tools=tools or None,
        variables=body.chat_template_kwargs,
    )
    service.check_length(len(prompt), "messages")
    prompt_text = tokenizer.decode(prompt, skip_special=False)
    response_format = _binding(body, tools, dialect)
    return Conversation(prompt, tools, response_format, dialect, prompt_text)


def _binding(body: ChatCompletionRequest, tools: list[dict[str, Any]], dialect: Dialect) -> dict[str, Any] | None:
    asked = body.response_format
    if asked is not None and asked.get("type") == "text":
        asked = None
    if asked is not None and tools:
        message = 'response_format binds the whole reply, so no tool could be called; set tool_choice to "none"'
        raise ApiError(400, message, param="response_format")
    if not tools or body.tool_choice == "auto":
        return asked
    parallel = body.parallel_tool_calls
    if isinstance(body.tool_choice, NamedTool):
        name, parallel = body.tool_choice.function.name, False
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    return {"type": "grammar", "grammar": tool_grammar(dialect, tools, "required", parallel=parallel)}
