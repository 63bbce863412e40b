"""The model and the recipe that a CONFIG on the command line means. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fireflyer.config import ModelConfig
    from fireflyer.train.settings import Recipe


def find_model(name: str) -> ModelConfig:
    """The shape of a checkpoint or run folder, a GGUF file, a config.json, a recipe or a shipped model.

    Raises UserError.
    """
    from fireflyer.config.files import find_config
    from fireflyer.config.model_config import ModelConfig

    if _is_gguf(name):
        from fireflyer.checkpoint.gguf import gguf_config

        return gguf_config(name)
    recipe = find_recipe(name)
    return ModelConfig.from_file(find_config(name)) if recipe is None else recipe.model


def find_recipe(name: str) -> Recipe | None:
    """The recipe, where the CONFIG is one; it may leave the vocabulary to its tokenizer. Raises UserError."""
    from fireflyer.config.files import find_config

    if _is_gguf(name) or find_config(name).suffix != ".toml":
        return None
    from fireflyer.train.recipe import load_recipe

    return load_recipe(name)


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf") and Path(name).is_file()
