"""A conversation as the prompt that a checkpoint's dialect makes of it.

In: messages and tools as the OpenAI API has them. Out: one text, up to where the assistant's answer begins, or goes on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fireflyer.errors import UserError
from fireflyer.text.dialects import Dialect
from fireflyer.text.messages import checked_messages, checked_tools
from fireflyer.text.special_tokens import THINK_BEGIN, THINK_END
from fireflyer.text.templates import TOOLS_BARE, TOOLS_FENCED, Message, Tool, render_chat

# Two noncharacters, never found in text: where the message to be continued ends.
_CUT = "\ufdd1\ufdd1"


def chat_prompt(
    dialect: Dialect,
    messages: Sequence[Message],
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = True,
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
) -> str:
    """The prompt. Raises UserError for what the template can't take.

    `continue_final_message`: end inside the last message, the assistant's, which the answer then goes on with; its
    `reasoning_content`, if it has one, comes before, as thinking (left open where there is no content yet).
    """
    template = dialect.chat_template
    if template is None:
        raise UserError("this tokenizer has no chat template; only plain prompts can be used")
    variables = _switches(variables or {}, special_tokens)
    checked = checked_messages(messages, dialect)
    listed = checked_tools(tools) if tools else None
    if listed and not dialect.lists_tools:
        checked = _with_tools(checked, listed, dialect)

    def rendered(said: Sequence[Message], prompted: bool) -> str:
        return render_chat(
            said,
            template,
            special_tokens=special_tokens,
            add_generation_prompt=prompted,
            tools=listed,
            variables=variables,
        )

    if not continue_final_message:
        return rendered(checked, add_generation_prompt)
    last = checked[-1]
    if last["role"] != "assistant" or "tool_calls" in last:
        what = "a call of tools" if "tool_calls" in last else f"by {last['role']!r}"
        raise UserError(
            f"continue_final_message goes on with a text of the assistant, but the last message of the chat is {what}"
        )
    if last.get("reasoning_content") or (dialect.thinks and last["content"].lstrip().startswith(THINK_BEGIN)):
        return _with_thought(rendered(checked[:-1], True), last, dialect)
    said = {**last, "content": last["content"] + _CUT}
    before, found, _ = rendered([*checked[:-1], said], False).rpartition(_CUT)
    if not found:
        raise UserError("the chat template leaves out the message that continue_final_message is to go on with")
    return before


def _with_thought(prompt: str, message: Message, dialect: Dialect) -> str:
    """A message that begins with thinking, after the prompt that asks for it: templates cut past thinking away."""
    thinking = dialect.thinking_at_end(prompt)
    if thinking == "closed":
        raise UserError(
            "the last message has thinking to go on with, but this prompt leaves no room for it; switch thinking on or "
            "leave it out"
        )
    thought, answer = message.get("reasoning_content"), message["content"]
    if not thought:
        if thinking == "unopened":
            return prompt + answer
        thought, _, answer = answer.lstrip()[len(THINK_BEGIN) :].partition(THINK_END)
    if thinking == "unopened":
        prompt += THINK_BEGIN
    # Line breaks after the marks are the prompt's: R1 has them, V3.1 has none.
    answer = answer.lstrip("\n") and THINK_END + ("\n\n" if prompt.endswith("\n") else "") + answer.lstrip("\n")
    return prompt + thought.lstrip("\n") + answer


def _switches(variables: Mapping[str, Any], special_tokens: Mapping[str, str]) -> Mapping[str, Any]:
    """A template's variables; V3.1's `thinking` and the other makers' `enable_thinking` stand for each other."""
    for name in ("messages", "tools", "add_generation_prompt", *special_tokens):
        if name in variables:
            raise UserError(f"{name!r} can't be a variable of the chat template; it has a place of its own")
    for name, other in (("thinking", "enable_thinking"), ("enable_thinking", "thinking")):
        if name in variables and other not in variables:
            variables = {**variables, other: variables[name]}
    return variables


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[Tool], dialect: Dialect) -> list[dict[str, Any]]:
    """The list of tools as system text, for a template that leaves tools out though the dialect can call them."""
    if dialect.tool_format is None:
        raise UserError("tools can't be used: this chat template has no form for them; leave tools out")
    described = (TOOLS_FENCED if dialect.tool_format == "fenced" else TOOLS_BARE) + "{{- describe(tools) -}}"
    text = render_chat([], described, special_tokens={}, add_generation_prompt=False, tools=tools)
    first = next((index for index, message in enumerate(messages) if message["role"] == "system"), None)
    if first is None:
        return [{"role": "system", "content": text}, *messages]
    system = {**messages[first], "content": f"{messages[first]['content']}\n\n{text}"}
    return [*messages[:first], system, *messages[first + 1 :]]
