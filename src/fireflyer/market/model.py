"""A market model as a folder, and back: the decoder in the published format, the rest beside it.

`config.json` and `model.safetensors` are the decoder's, as every engine reads them; `heads.safetensors` holds front end
and heads; `recipe.toml` what it was trained by; `fold.json` what it was trained on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fireflyer.checkpoint.hf import load_model, published_views, write_published
from fireflyer.checkpoint.run import sync
from fireflyer.checkpoint.run_folder import RECIPE, writing
from fireflyer.config.files import read_json
from fireflyer.errors import UserError
from fireflyer.market.features import Floats
from fireflyer.market.network import BarNetwork, Forecast, forecast
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import MarketRecipe, load_market_recipe
from fireflyer.market.tokens import TokenNetwork
from fireflyer.model.decoder import Decoder, init_weights_

MODEL = "model"
FOLD = "fold.json"
HEADS = "heads.safetensors"
_DECODER = "decoder."

Network = BarNetwork | TokenNetwork


@dataclass(frozen=True)
class MarketModel:
    """A trained network, its recipe, and the record of what it was trained on (see training.py)."""

    network: Network
    recipe: MarketRecipe
    record: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> MarketModel:
        """From a run's folder or its `model/`. Raises UserError."""
        folder = Path(path)
        if (folder / MODEL).is_dir():
            folder = folder / MODEL
        if not (folder / FOLD).is_file() or not (folder / HEADS).is_file():
            raise UserError(f"{path}: no finished market model (no {HEADS}); train it: fireflyer market train")
        recipe, record = load_market_recipe(folder), read_record(folder)
        return cls(open_network(folder, recipe, record["inputs"]), recipe, record)

    def scores(self, panel: Panel, first: int = 0) -> Floats:
        """(D, N): the signal, see Forecast.signal."""
        return self.forecast(panel, first).signal()

    def forecast(self, panel: Panel, first: int = 0) -> Forecast:
        """Forecasts of the sessions from row `first` on, see network.forecast. Raises UserError for another panel."""
        if not isinstance(self.network, BarNetwork):
            raise UserError('this model reads tokens and gives scenarios; forecasts need front_end = "bars"')
        return forecast(self.network, panel, self.recipe.train.seq_len, tuple(self.record["inputs"]), first)


def new_network(recipe: MarketRecipe, inputs: list[str]) -> Network:
    """Untrained; the same weights for the same seed."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    decoder = Decoder(recipe.train.model)
    init_weights_(decoder, generator)
    network = _around(decoder, recipe, inputs)
    with torch.no_grad():
        for part in (part for name, part in network.named_children() if name != "decoder"):
            for layer in part.modules():
                if isinstance(layer, nn.Linear | nn.Embedding):
                    for parameter in layer.parameters():
                        parameter.normal_(0.0, layer.weight.shape[1] ** -0.5, generator=generator)
    return network


def open_network(folder: Path, recipe: MarketRecipe, inputs: list[str]) -> Network:
    """As `write_network` wrote it. Raises UserError."""
    network = _around(load_model(folder), recipe, inputs)
    try:
        tensors = load_file(folder / HEADS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / HEADS} can't be read ({error}); copy it again, or train anew") from None
    state = _beside_decoder(network)
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in state.items()}:
        raise UserError(f"{folder / HEADS} belongs to another recipe than {folder / RECIPE}; copy the folder again")
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
    return network


def write_network(folder: Path, network: Network) -> None:
    """Decoder and heads into an existing folder."""
    write_published(
        folder, network.decoder.config, dict(published_views(network.decoder.config, network.decoder.state_dict()))
    )
    save_file({name: tensor.contiguous() for name, tensor in _beside_decoder(network).items()}, folder / HEADS)


def save_model_folder(folder: Path, network: Network, recipe: MarketRecipe, record: dict[str, Any]) -> None:
    """A whole model folder that appears at once; one that is there is replaced."""
    part = folder.with_name(f".{folder.name}.part")
    with writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_network(part, network)
        (part / RECIPE).write_text(recipe.to_toml(), encoding="utf-8")
        (part / FOLD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for file in sorted(part.iterdir()):
            sync(file)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync(folder.parent)


def read_record(folder: Path) -> dict[str, Any]:
    """fold.json. Raises UserError."""
    return read_json(folder / FOLD)


def _around(decoder: Decoder, recipe: MarketRecipe, inputs: list[str]) -> Network:
    if recipe.market.front_end == "bars":
        return BarNetwork(decoder, len(inputs), tuple(recipe.market.horizons))
    return TokenNetwork(decoder)


def _beside_decoder(network: Network) -> dict[str, Tensor]:
    """Parameters and buffers of all but the decoder, live."""
    return {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(_DECODER)}
