"""What a checkpoint's files hold, counted: of one that lies here, or of a released one from its names alone.

In: a folder, or a config, with an index's names or without. Out: tensors, numbers and bytes by dtype, and a Checkpoint
whose tensors have shapes and dtypes but no bytes to read: enough to plan a conversion of 689 GB that aren't here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from fireflyer.checkpoint.names import published_names, published_places, scale_name
from fireflyer.checkpoint.published import CONFIG, INDEX, Checkpoint, assemble, is_stray, list_tensors
from fireflyer.checkpoint.safetensors_file import StoredTensor
from fireflyer.config import ModelConfig
from fireflyer.config.files import read_json
from fireflyer.errors import UserError
from fireflyer.numerics.fp8 import scale_shape

_STRAY = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Share:
    """Tensors of one dtype."""

    tensors: int
    numbers: int
    bytes: int


def num_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """What a tensor takes in a file."""
    return prod(shape) * dtype.itemsize


def count(tensors: Iterable[tuple[torch.dtype, Sequence[int]]]) -> dict[str, Share]:
    """Tensors, numbers and bytes by dtype, most bytes first."""
    shares: dict[str, Share] = {}
    for dtype, shape in tensors:
        kind = str(dtype).removeprefix("torch.")
        old = shares.get(kind, Share(0, 0, 0))
        shares[kind] = Share(old.tensors + 1, old.numbers + prod(shape), old.bytes + num_bytes(dtype, shape))
    return dict(sorted(shares.items(), key=lambda item: -item[1].bytes))


def stored_tensors(folder: Path, config: ModelConfig) -> tuple[dict[str, StoredTensor], list[str]]:
    """A folder's tensors as they are stored, and the names of those that a reader passes over. Raises UserError."""
    stored = list_tensors(folder)
    ignored = sorted(name for name in stored if is_stray(name, config))
    return {name: tensor for name, tensor in stored.items() if name not in set(ignored)}, ignored


def names_in_index(folder: Path) -> list[str] | None:
    """The names in a folder's index where none of its shards is there; None where there is more, or less."""
    if not (folder / INDEX).is_file() or any(folder.glob("*.safetensors")):
        return None
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{folder / INDEX}: no weight_map from tensors to files is in it; copy or download it again")
    return list(weight_map)


def list_by_name(
    config: ModelConfig, source: Path, names: Collection[str] | None = None
) -> tuple[Checkpoint, dict[str, StoredTensor], list[str]]:
    """(a checkpoint without bytes, its tensors as they are stored, names passed over) of published files of a config.

    names: those that an index lists; None: those of the released files. Dtypes are those of the released files: FP8
    where scales are, gate biases and scales fp32, all else bf16. Raises UserError for names that don't fit.
    """
    if names is None:
        # Kimi-K2's released files hold the rotary frequencies of each layer.
        strays = range(config.num_hidden_layers) if config.model_type == "kimi_k2" else ()
        names = [*published_names(config), *(_STRAY.format(layer) for layer in strays)]
    names = set(names)
    ignored = sorted(name for name in names if is_stray(name, config))
    stored = {name: StoredTensor(source, name, torch.float32, (), 0) for name in names}
    block = (config.quantization_config or {}).get("weight_block_size")
    for place in published_places(config):
        if place.name not in names:
            continue
        dtype, scale = (torch.float32 if place.is_gate_bias else torch.bfloat16), scale_name(place.name)
        if place.is_quantized and scale in names:
            if block is None:
                raise UserError(f"{source / CONFIG}: no quantization_config, but {scale} is there; take the original")
            dtype = torch.float8_e4m3fn
            shape = scale_shape((place.shape[0], place.shape[1]), (block[0], block[1]))
            stored[scale] = StoredTensor(source, scale, torch.float32, shape, 0)
        stored[place.name] = StoredTensor(source, place.name, dtype, place.shape, 0)
    checkpoint = assemble(source, config, stored)
    return checkpoint, {name: tensor for name, tensor in stored.items() if name not in set(ignored)}, ignored
