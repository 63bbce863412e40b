"""Settings from several places, one over the other: merged, and where each of them came from.

In: layers, the lowest first. Out: plain nested values; the label of whoever gave a key. No torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LENGTHS = ("steps", "tokens", "epochs")


@dataclass(frozen=True)
class Layer:
    """Settings from one place; `labels` says for single keys how the user spelt them, `label` for the rest.

    whole_model: its [model] replaces what lies below it, instead of changing single keys.
    """

    values: dict[str, Any]
    label: str
    labels: dict[str, str]
    whole_model: bool = False


def merged_values(layers: list[Layer]) -> dict[str, Any]:
    """Later layers win, table by table, unless a model is whole; the last layer with a length decides it."""
    merged: dict[str, Any] = {}
    for layer in layers:
        lengths = [key for key in LENGTHS if key in layer.values]
        if lengths:
            merged = {key: value for key, value in merged.items() if key not in LENGTHS}
        if layer.whole_model:
            merged.pop("model", None)
        values = {key: value for key, value in layer.values.items() if key not in lengths[1:]}
        merged = _merge(merged, values)
    return merged


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def origin_of(key: str, layers: list[Layer]) -> str:
    """Where the value of a key (or of what holds it) came from."""
    for layer in reversed(layers):
        inner: Any = layer.values
        for part in key.partition("[")[0].split("."):
            inner = inner.get(part, None) if isinstance(inner, dict) else None
        if inner is not None:
            named = [
                label for name, label in layer.labels.items() if key == name or key.startswith((f"{name}.", f"{name}["))
            ]
            return named[-1] if named else layer.label
    return next((layer.label for layer in layers if layer.label), "the defaults")


def model_source(layers: list[Layer]) -> str:
    """Everything that says something of the model, for messages."""
    parts = []
    for layer in layers:
        if layer.label and "model" in layer.values:
            settings = [label for key, label in layer.labels.items() if key.startswith("model.")]
            parts += settings or [f"{layer.label} [model]"]
    return ", ".join(parts)


def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested tables; an empty table is a value."""
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the tables on its way."""
    *tables, last = key.split(".")
    for table in tables:
        if not isinstance(values.get(table), dict):
            values[table] = {}
        values = values[table]
    values[last] = value


def toml_value(text: str) -> Any:
    """The TOML value, or the text itself where it is none: `--set dtype=fp32` needs no quotes."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return table["value"] if len(table) == 1 else text.strip()
