"""Chat messages in, the one string that the model was trained on out (jinja2, sandboxed).

CHAT_TEMPLATE is DeepSeek-V3's form: system text right after the begin token, a bare Assistant token as the generation
prompt, past replies word for word, each closed by the end token, tool calls and outputs between their own tokens.
A checkpoint's own template, if it has one, is used in its place.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fireflyer.errors import UserError

Message = Mapping[str, Any]

CHAT_TEMPLATE = """\
{%- set state = namespace(system=[], after_outputs=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
    {%- set state.system = state.system + [message['content']] -%}
{%- endfor -%}
{%- if tools -%}
    {%- set state.system = state.system + ['## Tools\\nYou may call these functions:'] -%}
    {%- for tool in tools -%}
        {%- set state.system = state.system + [tool | tojson] -%}
    {%- endfor -%}
{%- endif -%}
{{- bos_token + state.system | join('\\n\\n') -}}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<｜User｜>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- if not state.after_outputs -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
        {{- message['content'] or '' -}}
        {%- for call in message['tool_calls'] or [] -%}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' -}}
            {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' -}}
            {%- set arguments = call['function']['arguments'] -%}
            {{- arguments if arguments is string else arguments | tojson -}}
            {{- '\\n```<｜tool▁call▁end｜>' -}}
            {%- if loop.last -%}{{- '<｜tool▁calls▁end｜>' -}}{%- endif -%}
        {%- endfor -%}
        {{- eos_token -}}
    {%- elif message['role'] == 'tool' -%}
        {{- '\\n' if state.after_outputs else '<｜tool▁outputs▁begin｜>' -}}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
        {%- if loop.last or loop.nextitem['role'] != 'tool' -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
    {%- elif message['role'] != 'system' -%}
        {{- raise_exception("role '" + message['role'] + "' is not one of system, user, assistant, tool") -}}
    {%- endif -%}
    {%- set state.after_outputs = message['role'] == 'tool' -%}
{%- endfor -%}
{%- if add_generation_prompt and not state.after_outputs -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""


def render_chat(
    messages: Sequence[Message],
    template: str = CHAT_TEMPLATE,
    *,
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Render messages (dicts with `role` and `content`) as text.

    `special_tokens` are the names a template reads (bos_token, eos_token, pad_token); `variables` are a template's own
    switches (V3.1's `thinking`). Raises UserError when the messages don't fit the template.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'message {index} of the chat must be an object with "role" and "content", got {message!r}')
    try:
        return _compiled(template).render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
            **(variables or {}),
        )
    except (TemplateError, TypeError, KeyError) as error:
        # A TypeError is a message whose content is missing or no string, added to one by the template.
        raise UserError(f"the chat template can't render these messages: {error}") from error


def shield(messages: Sequence[Message], control_tokens: Sequence[str]) -> tuple[list[Message], str]:
    """Break control tokens that others wrote into their messages, so that only the template's own ones count.

    Returns the messages with a mark inside each such token, and the mark: Unicode noncharacters found nowhere else in
    them, to be taken out again of the plain text between control tokens. The assistant's own replies are left alone:
    their thinking and tool tokens are meant.
    """
    everything = json.dumps(messages, ensure_ascii=False, default=str)
    mark = "\ufdd0"
    while mark in everything:
        mark += mark

    def break_tokens(value: Any) -> Any:
        if isinstance(value, str):
            for token in control_tokens:
                value = value.replace(token, token[0] + mark + token[1:])
            return value
        if isinstance(value, Mapping):
            return {key: break_tokens(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [break_tokens(item) for item in value]
        return value

    def shielded(message: Message) -> Message:
        if message.get("role") == "assistant":
            return message
        return {key: value if key == "role" else break_tokens(value) for key, value in message.items()}

    return [shielded(message) for message in messages], mark


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes <, > and & for HTML; published templates expect plain JSON.
    return json.dumps(value, ensure_ascii=False, indent=indent)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    # The options are those that published chat templates are written for.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise UserError(f"the chat template is not valid jinja2: {error}") from error
