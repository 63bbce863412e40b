"""A checkpoint in the published format, opened: every tensor located and checked, none read into memory.

In: a folder with config.json and safetensors in fp32, bf16, fp16 or block FP8, one file or shards with an index; a run
folder, whose newest good checkpoint is meant; or a GGUF file. Out: the config as the files have it, and each published
tensor as rows that are read (and dequantised) on demand. Whatever is missing, superfluous or misshaped is refused by
name before anything is loaded. Report sections 2.2 and 3.3; README_WEIGHTS.md of the V3 repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fireflyer.checkpoint.gguf import GGUFPublished, is_gguf, open_gguf
from fireflyer.checkpoint.names import EMBEDDING, HEAD, Place, published_places, scale_name
from fireflyer.checkpoint.run import CHECKPOINTS, find_checkpoint
from fireflyer.checkpoint.safetensors_file import StoredTensor, read_header, rows_per_chunk
from fireflyer.checkpoint.trainer_state import EMA_PREFIX, TENSORS
from fireflyer.config import ModelConfig
from fireflyer.config.files import read_json
from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.numerics.fp8 import dequantize_block, scale_shape

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERSION = "conversion.json"
"""How far a conversion into the folder is."""
ADAPTER_CONFIG = "adapter_config.json"

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"model\.layers\.([0-9]{1,9})\.(.+)")


@dataclass(frozen=True)
class BlockFP8Tensor:
    """An FP8 matrix and its scales, perhaps of another shard; rows come dequantised, in fp32."""

    weight: StoredTensor
    scale_inv: StoredTensor
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def path(self) -> Path:
        return self.weight.path

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.read(rows, torch.float32)

    def read(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Rows along the first axis, rounded once to `dtype`."""
        start, stop, _ = rows.indices(self.shape[0])
        height = self.block[0]
        first = start // height  # scales hold for whole rows of blocks, so read from the block's upper edge
        weight = self.weight[first * height : stop]
        scale_inv = self.scale_inv[first : -(-stop // height)]
        return dequantize_block(weight, scale_inv, self.block, dtype)[start - first * height :]


PublishedTensor = StoredTensor | BlockFP8Tensor | GGUFPublished


@dataclass(frozen=True)
class Checkpoint:
    """`config` is what the tensors are: without quantisation, and without MTP layers where the files hold none.

    folder: where they lie; a GGUF file itself.
    """

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, PublishedTensor]


def resolve_checkpoint(path: str | Path) -> Path:
    """The published folder that a CHECKPOINT means: itself, or a run's newest good checkpoint. Raises UserError."""
    try:
        return _resolve(Path(path))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); check the path and its permissions") from None


def _resolve(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a checkpoint (config.json and safetensors) or a run folder")
    if is_gguf(path) and path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: a file, where a checkpoint is a folder; give the folder it lies in")
    if (path / CONFIG).is_file():
        return path
    if (path / ADAPTER_CONFIG).is_file():
        raise UserError(_only_an_adapter(path))
    if (path / CONVERSION).is_file():
        raise UserError(f"{path}: a conversion that isn't finished; the command that began it goes on with it")
    if (path / CHECKPOINTS).is_dir():
        found = find_checkpoint(path)
        if found.path is None:
            reason = f"the newest is damaged: {found.damaged[0]}" if found.damaged else "it has saved none yet"
            raise UserError(f"{path}: this run has no good checkpoint ({reason}); let it train until one is saved")
        if (found.path / ADAPTER_CONFIG).is_file():
            raise UserError(_only_an_adapter(path))
        return found.path
    if not any(path.iterdir()):
        raise UserError(f"{path}: an empty folder; give a checkpoint (config.json and safetensors) or a run folder")
    raise UserError(f"{path}: neither {CONFIG} nor {CHECKPOINTS}/ is in it; give a checkpoint or a run folder")


def _only_an_adapter(path: Path) -> str:
    return (
        f"{path}: an adapter, which goes with the model that it was trained on; give that model with --adapter {path},"
        f" or make one of the two: fireflyer export {path} DIR --merge-adapter"
    )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Locate and check every tensor of a CHECKPOINT; only headers (and the MTP's copies) are read. Raises UserError."""
    folder = resolve_checkpoint(path)
    if is_gguf(folder):
        return Checkpoint(folder, *open_gguf(folder))
    config = ModelConfig.from_file(folder)
    if config.is_packed:
        raise UserError(
            f"{folder}: its weights are packed as integers, which is for running them; give the checkpoint that it was"
            " converted from"
        )
    checkpoint = assemble(folder, config, list_tensors(folder))
    for name, original in _copies(checkpoint.config):
        if name in checkpoint.tensors:
            _check_copy(name, checkpoint.tensors[name], original, checkpoint.tensors[original])
    own = [place.name for place in published_places(checkpoint.config)]  # without the head that is the embedding again
    return replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in own})


def assemble(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> Checkpoint:
    """The checkpoint that stored tensors make up, each with its place, its shape and its scales. Raises UserError."""
    tensors = _join_scales(stored, config, folder)
    if not any(_layer_of(name) >= config.num_hidden_layers for name in tensors):
        # transformers declares the MTP layer in every V3 config that it writes, and writes no MTP tensor.
        config = config.replace(num_nextn_predict_layers=0)
    config = config.replace(quantization_config=None)
    places = {place.name: place for place in published_places(config)}
    for name in [name for name in tensors if is_stray(name, config)]:
        del tensors[name]
    _check_names(folder, config, places, tensors)
    for name, place in places.items():
        _check_tensor(name, tensors[name], place)
    return Checkpoint(folder, config, tensors)


def open_ema(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the averaged weights that its run kept; gate biases have no average. Raises UserError."""
    path = checkpoint.folder / TENSORS
    averaged = {}
    if path.is_file():
        averaged = {n[len(EMA_PREFIX) :]: t for n, t in read_header(path).items() if n.startswith(EMA_PREFIX)}
    if not averaged:
        raise UserError(
            f"{checkpoint.folder}: it has no EMA weights; only runs with ema.decay above 0 keep them: leave --ema out"
        )
    tensors = dict(checkpoint.tensors)
    for place in published_places(checkpoint.config):
        source = averaged.get(place.name) or averaged.get(place.copy_of or "")
        if source is not None:
            _check_tensor(source.name, source, place)
            tensors[place.name] = source
        elif not place.is_gate_bias:
            raise UserError(f"{path}: no averaged {place.name} is in it, though others are; leave --ema out")
    return Checkpoint(checkpoint.folder, checkpoint.config, tensors)


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's model, from one file or from the shards that the index names."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.is_file():
        if single.is_file():
            return read_header(single)
        raise UserError(_no_weights(folder))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: no weight_map from tensors to files is in it; copy or download it again")
    shards = sorted(set(weight_map.values()))
    if single.is_file() and SINGLE not in shards:
        raise UserError(f"{folder}: both {SINGLE} and {INDEX} are in it, and they differ; remove the one not meant")
    tensors: dict[str, StoredTensor] = {}
    twice: list[StoredTensor] = []
    for shard in shards:
        if Path(shard).name != shard:
            raise UserError(f"{index}: names the file {shown(shard)}, which isn't in its folder; correct it")
        if not (folder / shard).is_file():
            count = sum(shard == other for other in weight_map.values())
            raise UserError(
                f"{folder / shard}: missing, though {INDEX} places {count} tensors there; download it again"
            )
        for name, stored in read_header(folder / shard).items():
            if name not in weight_map:
                raise UserError(
                    f"{folder / shard}: holds {shown(name, 120)}, which {INDEX} doesn't list; get both anew"
                )
            if weight_map[name] == shard:
                tensors[name] = stored
            else:
                twice.append(stored)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UserError(f"{folder / shard}: {shown(name, 120)} isn't in it, though {INDEX} says so; get both anew")
    if twice:
        name, other = shown(twice[0].name, 120), shown(weight_map[twice[0].name])
        raise UserError(f"{twice[0].path}: {name} is in it and in {other}, where {INDEX} places it; get both anew")
    return tensors


def _no_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors") if path.name != TENSORS)
    if shards:
        return f"{folder}: {shards[0]} is there, but neither {SINGLE} nor {INDEX}; get the index too"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return f"{folder}: {pickles[0]} isn't read (opening it can run code); convert the weights to safetensors"
    return f"{folder}: no weights ({SINGLE}, or {INDEX} with its shards) beside {CONFIG}; get them too"


def _join_scales(
    stored: Mapping[str, StoredTensor], config: ModelConfig, folder: Path
) -> dict[str, StoredTensor | BlockFP8Tensor]:
    """FP8 weights with their scales as one; whatever isn't FP8 as it is."""
    quantization = config.quantization_config or {}
    joined: dict[str, StoredTensor | BlockFP8Tensor] = dict(stored)
    for name, weight in stored.items():
        if weight.dtype != torch.float8_e4m3fn:
            continue
        scale_inv, label = stored.get(scale_name(name)), shown(name, 120)
        if scale_inv is None:
            raise UserError(
                f"{weight.path}: {label} is FP8, but its scales, {scale_name('...')}, are in no file; get them"
            )
        if not quantization:
            raise UserError(f"{folder / CONFIG}: no quantization_config, but {label} is FP8; take the original config")
        height, width = quantization["weight_block_size"]
        if len(weight.shape) != 2:
            raise UserError(f"{weight.path}: {label} is FP8 of shape {weight.shape}, not a matrix; get the file again")
        expected = scale_shape((weight.shape[0], weight.shape[1]), (height, width))
        if scale_inv.shape != expected or scale_inv.dtype != torch.float32:
            raise UserError(
                f"{scale_inv.path}: the scales of {label} are {_kind(scale_inv)}; its {weight.shape} in blocks of"
                f" {height} x {width} need float32 {expected}: check weight_block_size in {CONFIG}"
            )
        joined[name] = BlockFP8Tensor(weight, scale_inv, (height, width))
        del joined[scale_name(name)]
    return joined


def _layer_of(name: str) -> int:
    """The layer in a published name; -1 where it belongs to none."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else -1


def is_stray(name: str, config: ModelConfig) -> bool:
    """Kimi-K2's files hold the rotary frequencies of each layer, which follow from the config. No other
    superfluous tensor is passed over."""
    match = _LAYER.fullmatch(name)
    return (
        match is not None and match[2] == "self_attn.rotary_emb.inv_freq" and int(match[1]) < config.num_layers_with_mtp
    )


def _check_names(
    folder: Path, config: ModelConfig, places: dict[str, Place], tensors: dict[str, StoredTensor | BlockFP8Tensor]
) -> None:
    missing = [name for name in places if name not in tensors]
    optional = {HEAD} if config.tie_word_embeddings else set()
    extra = sorted(name for name in tensors if name not in places and name not in optional)
    if extra:
        # Told first: a misnamed tensor is both, and its own name says more than the one it should have had.
        beyond = _layer_of(extra[0]) >= config.num_layers_with_mtp
        hint = (
            f"layers end at {config.num_layers_with_mtp - 1} there: set num_hidden_layers or num_nextn_predict_layers"
            if beyond
            else f"give the {CONFIG} that belongs to the weights"
        )
        raise UserError(
            f"{tensors[extra[0]].path}: {shown(extra[0], 120)}{_and_more(extra)} has no place in the model of {CONFIG};"
            f" {hint}"
        )
    if missing:
        raise UserError(
            f"{folder}: {missing[0]}{_and_more(missing)} is missing, which {CONFIG} asks for; get all files of the"
            f" checkpoint, or the {CONFIG} that belongs to them"
        )


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tensor(name: str, tensor: StoredTensor | BlockFP8Tensor, place: Place) -> None:
    if tensor.shape != place.shape:
        raise UserError(
            f"{tensor.path}: {name} has shape {tensor.shape}, but {CONFIG} makes it {place.shape}; give the"
            f" {CONFIG} that belongs to the weights"
        )
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{tensor.path}: {name} is {_kind(tensor)}, which isn't read; convert to float32, bfloat16 or float16"
        )


def _kind(tensor: StoredTensor | BlockFP8Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tensor.shape}"


def _copies(config: ModelConfig) -> list[tuple[str, str]]:
    """(name, the tensor it has to repeat): the MTP's embedding and head, and the head of a model that ties it."""
    pairs = [(place.name, place.copy_of) for place in published_places(config) if place.copy_of is not None]
    return [*pairs, (HEAD, EMBEDDING)] if config.tie_word_embeddings else pairs


def _check_copy(name: str, copy: PublishedTensor, original_name: str, original: PublishedTensor) -> None:
    """The model has one embedding and one head. Passing over copies that differ would load another model than the
    files hold, so they are compared, chunk by chunk; of V3's 689 GB that reads 7 GB twice."""
    same = copy.shape == original.shape
    step = rows_per_chunk(copy.shape)
    for start in range(0, copy.shape[0] if same else 0, step):
        rows = slice(start, start + step)
        same = same and _same_bits(copy[rows], original[rows])
    if not same:
        raise UserError(
            f"{copy.path}: {name} differs from {original_name}, and the model shares the two; make the copy equal to it"
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype == b.dtype:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # NaN equals itself, and -0 isn't 0
    return torch.equal(a.float(), b.float())
