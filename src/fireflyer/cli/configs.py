"""The model that a CONFIG on the command line means. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fireflyer.config import ModelConfig


def find_model(name: str) -> ModelConfig:
    """The shape of a checkpoint or run folder, a config.json, a recipe or a shipped model. Raises UserError."""
    from fireflyer.config.files import find_config
    from fireflyer.config.model_config import ModelConfig

    path = find_config(name)
    if path.suffix != ".toml":
        return ModelConfig.from_file(path)
    # A recipe may leave the vocabulary to its tokenizer, which its own reader knows.
    from fireflyer.train.recipe import load_recipe

    return load_recipe(name).model
