"""A tokenizer.json and its settings taken apart: what plain text, control tokens, bytes and the template are in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from fireflyer.errors import UserError


def read_text(path: Path) -> str:
    """Raises UserError with the byte that isn't UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def parse(tokenizer_json: str, source: str) -> dict[str, Any]:
    """Raises UserError for what is no byte-level tokenizer.json."""
    try:
        parsed = json.loads(tokenizer_json)
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("model"), dict):
        raise UserError(f"{source} is not a tokenizer.json: it has no model")
    parts = [parsed.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    if '"ByteLevel"' not in json.dumps(parts):
        raise UserError(
            f"{source}: {parsed['model'].get('type')} without ByteLevel; only byte-level ones give back every text"
        )
    return parsed


def without_controls(parsed: dict[str, Any], source: str) -> tokenizers.Tokenizer:
    """The same tokenizer with nothing but plain text in mind: no control tokens, no begin token added, no truncation.

    `encode_special_tokens` of the library would not do: it still reads tokens not flagged special, and DeepSeek's
    <｜User｜> and <think> are such. Added tokens of white space alone are plain text and stay.
    """
    plain = {**parsed, "post_processor": None, "truncation": None, "padding": None}
    plain["added_tokens"] = [token for token in parsed.get("added_tokens") or [] if not token["content"].strip()]
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{source}: not a tokenizer.json that `tokenizers` can read: {error}") from error


def control_pattern(controls: Sequence[Mapping[str, Any]]) -> re.Pattern[str]:
    """Matches each added token as the file says it is to be found, the longest first."""
    longest_first = sorted(controls, key=lambda token: -len(token["content"]))
    alternatives = [
        (r"\s*" if token.get("lstrip") else "") + re.escape(token["content"]) + (r"\s*" if token.get("rstrip") else "")
        for token in longest_first
    ]
    return re.compile("|".join(alternatives) or r"(?!)")


def bytes_of_tokens(vocabulary: Mapping[str, int], controls: Mapping[str, int]) -> list[bytes]:
    """Bytes by id. Byte-level vocabularies spell each byte as one printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    by_id = [b""] * (max([*vocabulary.values(), *controls.values()]) + 1)
    for token, token_id in vocabulary.items():
        spelt = all(character in table for character in token)
        by_id[token_id] = bytes(table[character] for character in token) if spelt else token.encode("utf-8")
    for token, token_id in controls.items():
        by_id[token_id] = token.encode("utf-8")
    return by_id


def chat_template_of(settings: Mapping[str, Any]) -> str | None:
    """The template of tokenizer_config.json; None where it has none."""
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name, as older configs have them
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
