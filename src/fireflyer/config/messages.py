"""The wording of errors about settings: a value on one line, the nearest known name, a pydantic error as a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


def shown(value: object, limit: int = 60) -> str:
    """A value as it appears in an error: on one line and not too long."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped one; for dotted names the last part may also be what was meant."""
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return close[0]
    by_last = {key.rpartition(".")[2]: key for key in known}
    close = get_close_matches(name.rpartition(".")[2], by_last, n=1, cutoff=0.6)
    return by_last[close[0]] if close else None


def validation_message(error: ValidationError, source: str, known_keys: Iterable[str]) -> str:
    """One line of a pydantic error: the source, the key (dotted), the value and what was wanted.

    An unknown key goes first, as it usually explains a missing one; it names the nearest of `known_keys` (dotted).
    """
    errors = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{source}: {_sentence(errors[0], known_keys)}{rest}"


def _sentence(error: Any, known_keys: Iterable[str]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"the key {key} is missing; add it"
    if error["type"] == "extra_forbidden":
        return unknown_key(key, error["input"], known_keys)
    message = str(error["msg"]).removeprefix("Value error, ")
    if not key:
        return message
    return f"{key} = {shown(error['input'])}: {message[0].lower()}{message[1:]}"


def unknown_key(key: str, value: object, known_keys: Iterable[str]) -> str:
    """The sentence about a key that nobody reads."""
    guess = nearest(key, known_keys)
    return f"unknown key {key} = {shown(value)}" + (f"; did you mean {guess}?" if guess else "")
