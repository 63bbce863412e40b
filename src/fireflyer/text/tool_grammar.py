"""A grammar that leaves a reply no choice but to call tools, for tool_choice "required" or a function by name.

In: a dialect and the tools of a request. Out: a grammar in llguidance's Lark notation, of what comes after the
thinking. The dialect's marks are control tokens in it, so that no text can pass for them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fireflyer.errors import UserError
from fireflyer.text.dialects import Dialect
from fireflyer.text.special_tokens import (
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEPARATOR,
)
from fireflyer.text.templates import Tool

# Without a bound a model that is unsure writes blanks for ever. No key of a schema may loosen these.
_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}", "lenient": False, "coerce_one_of": False}


def tool_grammar(dialect: Dialect, tools: Sequence[Tool], choice: str, *, parallel: bool = True) -> str:
    """The grammar of one call or more. `choice`: "required", or the name of the one function that must be called, once;
    `parallel`: more than one call is allowed. Raises UserError, also for a function that is not among the tools."""
    if dialect.tool_format is None:
        raise UserError("tools can't be used: this chat template has no form for them; leave tools out")
    functions = [tool["function"] for tool in tools]
    if choice != "required":
        names = [function["name"] for function in functions]
        if choice not in names:
            raise UserError(
                f"tool_choice names the function {choice!r}, which is not among the tools: {', '.join(names)}"
            )
        functions, parallel = [functions[names.index(choice)]], False
    if not functions:
        raise UserError('tool_choice "required" needs at least one tool')
    fenced = dialect.tool_format == "fenced"
    between = '"\\n" ' if fenced else ""
    more = f" ({between}call)*" if parallel else ""
    lines = [
        f"start: {TOOL_CALLS_BEGIN} call{more} {TOOL_CALLS_END}",
        f"call: {TOOL_CALL_BEGIN} ({' | '.join(f'call_{i}' for i in range(len(functions)))}) {TOOL_CALL_END}",
    ]
    for i, function in enumerate(functions):
        name, arguments = function["name"], f"arguments_{i}"
        if fenced:
            named = json.dumps(f"{name}\n```json\n")
            head, tail = f'"function" {TOOL_SEPARATOR} {named}', ' "\\n```"'
        else:
            head, tail = f"{json.dumps(name)} {TOOL_SEPARATOR}", ""
        lines += [f"call_{i}: {head} {arguments}{tail}", f"{arguments}: %json {_schema(function)}"]
    return "\n".join(lines) + "\n"


def _schema(function: Mapping[str, Any]) -> str:
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise UserError(
            f"function {function['name']!r}: parameters must be a JSON schema of an object, got {schema!r:.80}"
        )
    return json.dumps({**schema, "type": "object", "x-guidance": _OPTIONS})
