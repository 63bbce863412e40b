"""The form an answer has to take, as a request states it. In: a `response_format`, OpenAI's kinds and four more.
Out: the same, its shape checked; whether a schema or a grammar makes sense, `structured_output` finds out.

    {"type": "text"}                                             any text
    {"type": "json_object"}                                      any JSON object
    {"type": "json_schema", "json_schema": {"schema": {...}}}    JSON after the schema; beside it "name", "description"
                                                                 and "strict", which changes nothing: it always is
    {"type": "regex", "pattern": "..."}                          text that the whole expression matches
    {"type": "choice", "choices": ["...", ...]}                  one of these texts
    {"type": "grammar", "grammar": "..."}                        a context-free grammar in llguidance's Lark notation
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fireflyer.errors import UserError

_KEYS = {
    "text": set(),
    "json_object": set(),
    "json_schema": {"json_schema"},
    "regex": {"pattern"},
    "choice": {"choices"},
    "grammar": {"grammar"},
}
_SCHEMA_KEYS = {"name", "description", "schema", "strict"}


def checked_response_format(value: object) -> dict[str, Any] | None:
    """A copy of a well-formed response_format; None for plain text. Raises UserError."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"response_format is {shown(value)}; it must be an object with a type, or None")
    try:
        form: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"response_format is no JSON: {error}") from None
    kind = form.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"response_format has the type {shown(kind)}; it must be one of {', '.join(_KEYS)}")
    _check_keys(f"response_format of type {kind}", form, _KEYS[kind] | {"type"}, required=_KEYS[kind])
    if kind == "json_schema":
        _check_json_schema(form["json_schema"])
    elif kind == "choice":
        choices = form["choices"]
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise UserError(f"response_format's choices are {shown(choices)}; they must be texts, none of them empty")
    elif kind in ("regex", "grammar"):
        (key,) = _KEYS[kind]
        if not isinstance(form[key], str) or not form[key]:
            raise UserError(f"response_format's {key} is {shown(form[key])}; it must be a text that is not empty")
    return None if kind == "text" else form


def _check_json_schema(value: object) -> None:
    where = "response_format's json_schema"
    if not isinstance(value, dict):
        raise UserError(f"{where} is {shown(value)}; it must be an object with a schema in it")
    _check_keys(where, value, _SCHEMA_KEYS, required={"schema"})
    for key in ("name", "description"):
        if not isinstance(value.get(key, ""), str | None):
            raise UserError(f"{where} has the {key} {shown(value[key])}; it must be a text")
    if not isinstance(value.get("strict"), bool | None):
        raise UserError(f"{where} has strict={shown(value['strict'])}; it must be true or false")
    if not isinstance(value["schema"], dict):
        raise UserError(f"{where} has the schema {shown(value['schema'])}; it must be an object")


def _check_keys(where: str, value: dict, known: set[str], required: set[str]) -> None:
    unknown = [key for key in value if key not in known]
    if unknown:
        raise UserError(f"{where} has {shown(unknown[0])}; it may have {', '.join(sorted(known))}")
    missing = sorted(required - value.keys())
    if missing:
        raise UserError(f"{where} has no {missing[0]}")


def shown(value: object) -> str:
    """A value from outside, for a message: of whatever size and depth."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits; nested without end
        return f"a {type(value).__name__} beyond all bounds"
    return text if len(text) <= 100 else text[:100] + "..."
