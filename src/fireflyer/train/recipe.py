"""Recipes: found, layered, checked, written down and compared.

In: a preset's name, a TOML file, a model's config.json or a checkpoint; `--set key=value` and the other options on top.
Out: one resolved `Recipe`; its TOML text (read back equal); the differences that make a rerun another run. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fireflyer.config import ModelConfig, load_config
from fireflyer.config.files import PRESETS, find_config, read_toml
from fireflyer.config.messages import nearest, shown
from fireflyer.errors import UserError
from fireflyer.train.extension import ExtendPhase, extension_layer
from fireflyer.train.layers import (
    LENGTHS,
    Layer,
    leaves,
    merged_values,
    model_source,
    origin_of,
    put,
    toml_value,
)
from fireflyer.train.quantities import parse_quantity
from fireflyer.train.settings import FinalPhase, Recipe
from fireflyer.train.size import parse_size, sized_settings
from fireflyer.train.tables import SettingError, Table
from fireflyer.train.toml import to_toml_text

DEFAULT_RECIPE = "ember"
DEFAULT_VOCAB_SIZE = 4096
"""Size of the tokenizer trained on the data where neither the recipe nor a tokenizer file gives one."""

LAYOUT = frozenset(f"parallel.{key}" for key in ("pp", "dp", "cp", "ep", "zero", "schedule", "stages"))
MAY_CHANGE = LAYOUT | {*LENGTHS, "checkpoint_every", "keep_checkpoints", "eval_every", "eval_samples", "log_every"}
"""Keys that a rerun of the same folder may change: a checkpoint of one layout of ranks resumes on another."""

CHOICES = {"device": "auto", "dtype": "auto", "threads": 0}
"""Keys whose given value means "choose"; the run stores what was chosen, and a rerun takes that."""


def load_recipe(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    sources: Sequence[str] | None = None,
    tokenizer: str | None = None,
    init_from: str | None = None,
    encoding_errors: str | None = None,
    size: str | None = None,
    base: str | None = None,
) -> Recipe:
    """The recipe of a command. Raises UserError with the key, the value, where it came from and how to mend it.

    Args:
        config: a preset's name, a recipe (.toml), a run folder, or a model shape (config.json, a checkpoint folder),
            which is trained with the default settings. None: the shape of `init_from`, or else the preset ember.
        overrides: "key=value", dotted keys, TOML values; a bare word is a string.
        sources, tokenizer, encoding_errors: data.sources, data.tokenizer, data.encoding_errors.
        init_from: a checkpoint to go on from: its model replaces the recipe's, its tokenizer is the default.
        size: total parameters ("10M"), from which model, learning rate, batch and tokens follow (see size.py); not
            with init_from.
        base: a preset that lies below all of it, as sft for fine-tuning.
    """
    layers = [_layer_of(base)] if base is not None else []
    if config is not None or (init_from is None and base is None):
        layers.append(_layer_of(config))
    options = {
        "data.sources": (list(sources) if sources else None, "--data"),
        "data.tokenizer": (tokenizer, "--tokenizer"),
        "data.encoding_errors": (encoding_errors, "--encoding-errors"),
    }
    if init_from is not None:
        layers.append(_layer_of_checkpoint(init_from))
    given = [
        _layer_of_options({key: pair for key, pair in options.items() if pair[0] is not None}),
        _layer_of_overrides(overrides),
    ]
    if size is not None:
        if init_from is not None:
            raise UserError(f"--size {size}: the checkpoint of --from {init_from} has its size; leave one of them out")
        layers.append(_layer_of_size(size, [*layers, *given], given))
    layers += given
    extension = extension_layer(layers) if init_from is not None else None
    return _resolve(layers if extension is None else [*layers, extension])


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe that a run stored; nothing else is read. Raises UserError."""
    return _build([Layer(read_toml(path), str(path), {})])


def recipe_of(values: dict[str, Any], label: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of settings that were read as part of something else, `label`. Raises UserError."""
    return _build([Layer(values, label, {}), _layer_of_overrides(overrides)])


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML; `read_recipe` of it gives an equal one."""
    return to_toml_text(as_tables(recipe))


def as_tables(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain nested tables without absent keys; [model] in the published spelling."""
    tables = recipe.model_dump(mode="json", exclude={"model"})
    model = recipe.model.to_dict()
    # TOML has no null: absent means None, but for this key, which the published config must give.
    model["q_lora_rank"] = model["q_lora_rank"] or 0
    return _without_none({**tables, "model": model})


def with_epoch_tokens(recipe: Recipe, epoch_tokens: int) -> Recipe:
    """Where the length is given in epochs: the recipe with that length in tokens of the training data."""
    if recipe.epochs is None or recipe.steps is not None or recipe.tokens is not None:
        return recipe
    tokens = max(1, round(recipe.epochs * epoch_tokens))
    return _validate({**dict(recipe), "tokens": tokens, "epochs": None}, [Layer({}, "the length of the data", {})])


def take_stored_choices(recipe: Recipe, stored: Recipe) -> Recipe:
    """`recipe` with what the stored run chose wherever the recipe leaves the choice (device, dtype, threads).

    The threads of a rank were chosen beside as many others: with another number of ranks the choice is made anew.
    """
    open_keys = [key for key, choose in CHOICES.items() if getattr(recipe, key) == choose]
    if recipe.parallel.ranks != stored.parallel.ranks:
        open_keys = [key for key in open_keys if key != "threads"]
    return recipe.model_copy(update={key: getattr(stored, key) for key in open_keys})


def recipe_differences(stored: Recipe, recipe: Recipe) -> list[str]:
    """What makes `recipe` another run than `stored`, as "key: old -> new" lines; empty where it may go on."""
    before, after = as_tables(stored), as_tables(take_stored_choices(recipe, stored))
    lines = []
    for name in sorted(before.keys() ^ after.keys()):  # a whole table is one difference, not one for each of its keys
        if isinstance(table := before.get(name, after.get(name)), dict) and table:
            lines.append(f"[{name}]: " + ("given -> not given" if name in before else "not given -> given"))
            before.pop(name, None)
            after.pop(name, None)
    old, new = dict(leaves(before)), dict(leaves(after))
    may_change = MAY_CHANGE
    if any(old.get(key) != new.get(key) for key in LAYOUT):
        may_change = MAY_CHANGE | {"threads", "parallel.micro_batch_size"}  # what fits a rank is another on others
    for key in sorted(old.keys() | new.keys()):
        if key not in may_change and old.get(key) != new.get(key):
            was, now = (shown(side[key]) if key in side else "not set" for side in (old, new))
            lines.append(f"{key}: {was} -> {now}")
    return lines


def known_keys() -> list[str]:
    """Every dotted key of a recipe, tables and [model]'s keys included."""
    model = [f"model.{key}" for key in ModelConfig.model_fields if key != "extra"]
    return [*_table_keys(Recipe), *model]


def _table_keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in table.model_fields.items():
        yield prefix + name
        may_be_absent = get_origin(field.annotation) is UnionType
        for kind in get_args(field.annotation) if may_be_absent else [field.annotation]:
            if isinstance(kind, type) and issubclass(kind, Table):
                yield from _table_keys(kind, f"{prefix}{name}.")


# --- Where settings come from


def _layer_of(config: str | Path | None) -> Layer:
    config = DEFAULT_RECIPE if config is None else config
    path = Path(config)
    preset = PRESETS / f"{config}.toml"
    if path.is_dir() and (path / "recipe.toml").is_file():
        path = path / "recipe.toml"
    elif not path.exists() and path.name == str(config) and preset.is_file():
        return Layer(read_toml(preset), f"preset {config}", {})
    else:
        path = find_config(config)
    if path.suffix == ".toml":
        return Layer(read_toml(path), str(path), {})
    label = f"preset {config}" if path.parent == PRESETS else str(path)
    return Layer({"model": _full_precision(ModelConfig.from_file(path))}, label, {})


def _layer_of_checkpoint(init_from: str) -> Layer:
    folder, label = Path(init_from), f"--from {init_from}"
    if not folder.is_dir():
        raise UserError(f"{label}: no such folder; give a checkpoint (config.json and safetensors) or a run folder")
    values: dict[str, Any] = {"init_from": init_from, "model": _full_precision(load_config(folder))}
    if (folder / "tokenizer.json").is_file():
        values["data"] = {"tokenizer": str(folder / "tokenizer.json")}
    return Layer(values, label, {}, whole_model=True)


def _layer_of_size(size: str, layers: list[Layer], given: list[Layer]) -> Layer:
    """What --size decides, for the tokenizer of all layers and the length that the user gives."""
    length = {key: value for key, value in merged_values(given).items() if key in ("steps", "tokens")}
    try:
        counts = {key: parse_quantity(value) for key, value in length.items()}
    except ValueError:
        counts = {}  # refused with its own words when the recipe is built
    asked = merged_values(given).get("model", {}).get("vocab_size")
    values = sized_settings(
        parse_size(size),
        vocab_size=_tokenizer_size(layers) or (asked if isinstance(asked, int) else None),
        tokens=counts.get("tokens") or None,
        steps=counts.get("steps") or None,
    )
    return Layer(values, f"--size {size}", {}, whole_model=True)


def _full_precision(config: ModelConfig) -> dict[str, Any]:
    """A published shape as it is trained: its weights are dequantised when loaded."""
    return config.replace(quantization_config=None).to_dict()


def _layer_of_options(options: dict[str, tuple[Any, str]]) -> Layer:
    values: dict[str, Any] = {}
    for key, (value, _) in options.items():
        put(values, key, value)
    return Layer(values, "the command line", {key: label for key, (_, label) in options.items()})


def _layer_of_overrides(overrides: Sequence[str]) -> Layer:
    values: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise UserError(f"--set {override}: not KEY=VALUE; write for example --set optimizer.weight_decay=0.1")
        labels[key] = f"--set {override}"
        _check_known({key: None}, labels[key])
        put(values, key, toml_value(text))
    return Layer(values, "--set", labels)


# --- From layers to a recipe


def _resolve(layers: list[Layer]) -> Recipe:
    tokenizer_size = _tokenizer_size(layers)
    model = merged_values(layers).get("model")
    if isinstance(model, dict) and not model.get("vocab_size"):
        layers = [*layers, Layer({"model": {"vocab_size": tokenizer_size or DEFAULT_VOCAB_SIZE}}, "", {})]
    recipe = _build(layers)
    if tokenizer_size and tokenizer_size > recipe.model.vocab_size:
        raise UserError(
            f"{recipe.data.tokenizer}: the tokenizer has {tokenizer_size} tokens and the model only model.vocab_size ="
            f" {recipe.model.vocab_size}; give the tokenizer that belongs to it, or --set model.vocab_size=0"
        )
    if recipe.init_from is not None and recipe.data.tokenizer is None:
        raise UserError(f"--from {recipe.init_from}: no tokenizer.json in it; give its own with --tokenizer FILE")
    return recipe


def _tokenizer_size(layers: list[Layer]) -> int | None:
    data = merged_values(layers).get("data")
    path = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(path, str):
        return None
    from fireflyer.text.tokenizer import Tokenizer

    return Tokenizer.from_file(path).vocab_size


def _build(layers: list[Layer]) -> Recipe:
    for layer in layers:
        _check_known(layer.values, layer.label, layer.labels)
    values = merged_values(layers)
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{layers[0].label}: no [model] table, which describes the model; add one")
    values["model"] = ModelConfig.from_dict(model, source=model_source(layers))
    return _validate(values, layers)


def _check_known(values: dict[str, Any], label: str, labels: dict[str, str] | None = None) -> None:
    """Refuse keys that nobody reads; those below [model] are ModelConfig's to check."""
    known = set(known_keys())
    for key, _ in leaves(values):
        parts = key.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path.startswith("model."):
                break
            if path not in known:
                guess = _nearest_key(path, known)
                where = f"in {(labels or {}).get(key, label)}"
                raise UserError(f"unknown key {path} {where}" + (f"; did you mean {guess}?" if guess else ""))


def _nearest_key(key: str, known: Iterable[str]) -> str | None:
    """A key of nearly that name in the table, one of that very name in another, or else the nearest."""
    known = sorted(known)
    table, _, name = key.rpartition(".")
    inside = [other.rpartition(".")[2] for other in known if table and other.rpartition(".")[0] == table]
    if near := nearest(name, inside):
        return f"{table}.{near}"
    elsewhere = [other for other in sorted(known) if other.rpartition(".")[2] == name]
    return elsewhere[0] if elsewhere else nearest(key, sorted(known))


def _validate(values: dict[str, Any], layers: list[Layer]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        # An unknown key goes first, as it usually explains a missing one.
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, SettingError):
        raise UserError(f"{cause} ({origin_of(cause.key, layers)})") from None
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:]
    raise UserError(_sentence(key, first["type"], first["msg"], first["input"], origin_of(key, layers))) from None


_WORDS = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "model_type": "must be a table of settings",
}


def _sentence(key: str, kind: str, message: str, value: object, origin: str) -> str:
    if kind == "extra_forbidden":
        head, _, name = key.rpartition(".")
        guess = nearest(name, [*FinalPhase.model_fields, *ExtendPhase.model_fields])
        return f"unknown key {key} in {origin}" + (f"; did you mean {head}.{guess}?" if guess else "")
    if kind == "missing":
        return f"{key} is missing in {origin}; add it"
    words = _WORDS.get(kind, message.removeprefix("Value error, ").replace("Input should be", "must be"))
    return f"{key} = {shown(value)}: {words} ({origin})"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_none(inner) for inner in value]
    return value
