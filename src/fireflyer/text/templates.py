"""Chat templates: the built-in ones, and how any is rendered (jinja2, sandboxed).

In: messages as a template reads them. Out: the one string that the model was trained on. BUILT_IN has DeepSeek's forms,
each rendering what the published template of its model renders, with two differences: `tools` are listed in the system
text (the published ones leave them out), and V3's adds the Assistant token after the last user message only when asked.
A checkpoint's own template, if it has one, is used in their place.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fireflyer.errors import UserError

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


def _shipped(name: str) -> str:
    return (Path(__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


# Each defines describe(tools), the system text that lists tools and shows how they are called.
TOOLS_FENCED = _shipped("tools_fenced")
TOOLS_BARE = _shipped("tools_bare")

BUILT_IN: Mapping[str, str] = {
    "v2": _shipped("v2"),
    "v3": TOOLS_FENCED + _shipped("v3"),
    "r1": TOOLS_FENCED + _shipped("r1"),
    "v3.1": TOOLS_BARE + _shipped("v3.1"),
}

# What every tokenizer trained here speaks.
CHAT_TEMPLATE = BUILT_IN["v3"]


def render_chat(
    messages: Sequence[Message],
    template: str = CHAT_TEMPLATE,
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages, already in the shape that the template reads, as text.

    `special_tokens` are the names a template reads (bos_token, eos_token, pad_token); `variables` are a template's own
    switches (V3.1's `thinking`). Raises UserError when the messages don't fit the template.
    """
    try:
        return _compiled(template).render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
            **(variables or {}),
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        # Beside jinja2's own errors what the expressions of a template may raise: adding None to a text, say.
        raise UserError(f"the chat template can't render these messages: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML; published templates expect plain JSON, with these options.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Generation(Extension):
    """{% generation %}, by which some templates mark what the assistant says for training: here just its contents."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def _compiled(template: str) -> Template:
    # The options are those that published chat templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"the chat template is not valid jinja2: {error}") from error
