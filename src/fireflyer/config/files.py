"""Where a config comes from: the word a user gave to the file meant; JSON and TOML, with errors that name the place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fireflyer.config.messages import nearest, shown
from fireflyer.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PRESETS = Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """Names of the recipes and model shapes that ship."""
    return sorted({path.stem for path in PRESETS.iterdir() if path.suffix in (".toml", ".json")})


def find_config(name_or_path: str | Path) -> Path:
    """The config.json or recipe .toml meant by a CONFIG: a folder, a file or a preset's name. Raises UserError.

    A run folder gives its newest checkpoint's config.json (all of a run's are alike), before the first its recipe.toml.
    Where a preset is both, the published shape goes before the recipe.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return _config_in_folder(path)
    if path.is_file():
        if path.suffix not in (".json", ".toml"):
            raise UserError(f"{path}: not a config.json and not a recipe (.toml); give one of these, or a folder")
        return path
    for suffix in (".json", ".toml"):
        if (preset := PRESETS / f"{name_or_path}{suffix}").is_file() and path.name == str(name_or_path):
            return preset
    names = preset_names()
    guess = nearest(str(name_or_path), names)
    meant = f"; did you mean {guess}?" if guess else "."
    raise UserError(f"{shown(str(name_or_path))} is no file or folder and no preset{meant} Presets: {', '.join(names)}")


def _config_in_folder(folder: Path) -> Path:
    newest_first = sorted(folder.glob("checkpoints/step-*/config.json"), reverse=True)
    for candidate in (folder / "config.json", *newest_first, folder / "recipe.toml"):
        if candidate.is_file():
            return candidate
    raise UserError(f"{folder}: neither a checkpoint (config.json) nor a run (checkpoints/, recipe.toml) is in it")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises UserError with file, line and column."""
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON at line {error.lineno} column {error.colno}: {error.msg}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {shown(value)}, not a JSON object; give a config.json")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises UserError with file, line and column."""
    try:
        return tomllib.loads(_read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: broken TOML: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is it the right file?") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the path") from None
