"""Models to and from the published format: what DeepSeek released, transformers and the engines read.

In: a CHECKPOINT, or a Decoder. Out: a Decoder, or a folder of config.json, safetensors (with an index where sharded)
and the tokenizer's files. Names and layout: `names`; checks on the way in: `published`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fireflyer.checkpoint.gguf import gguf_tokenizer, is_gguf
from fireflyer.checkpoint.names import EMBEDDING, published_names, published_places
from fireflyer.checkpoint.published import (
    CONFIG,
    FLOATS,
    INDEX,
    SINGLE,
    Checkpoint,
    open_checkpoint,
    resolve_checkpoint,
)
from fireflyer.checkpoint.run import sync
from fireflyer.checkpoint.safetensors_file import TensorRows, num_bytes, rows_per_chunk, write_safetensors
from fireflyer.config import ModelConfig
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.text.tokenizer import Tokenizer

__all__ = [
    "copy_tokenizer",
    "fill_model",
    "load_model",
    "load_opened",
    "load_tokenizer",
    "published_names",
    "published_views",
    "resolve_checkpoint",
    "save_model",
    "save_published",
    "stream_published",
    "write_published",
]

MAX_SHARD_BYTES = 5_000_000_000

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "tokenization_kimi.py",
    "chat_template.jinja",
    "generation_config.json",
)

# Where each loaded model came from, so that saving it takes the tokenizer along.
_loaded_from: WeakKeyDictionary[Decoder, Path] = WeakKeyDictionary()


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """A Decoder with the weights of a CHECKPOINT in fp32, bf16, fp16, or block FP8 or a GGUF file (dequantised).

    All parameters come in `dtype`, gate biases always in fp32. Memory stays within the model and one tensor: parameters
    are allocated once, unset, and filled from the files by rows. MTP layers that the config declares are left out where
    the files hold none of their tensors; their copies of embedding and head must equal the main ones to the bit.
    Raises UserError, naming file and tensor, before any memory is taken.
    """
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UserError(f"dtype {dtype} can't hold a model's weights; give torch.float32, bfloat16 or float16")
    return load_opened(open_checkpoint(path), dtype, device)


def load_opened(checkpoint: Checkpoint, dtype: torch.dtype, device: str | torch.device) -> Decoder:
    """`load_model` of a checkpoint that is open, perhaps with an adapter added."""
    with torch.device("meta"):
        model = Decoder(checkpoint.config)
    model.to(dtype).to_empty(device=device)
    fill_model(model, checkpoint)
    _loaded_from[model] = checkpoint.folder
    return model


def fill_model(model: Decoder, checkpoint: Checkpoint) -> None:
    """Read a checkpoint's tensors into the parameters that the model has; it may lack routed experts."""
    state = model.state_dict()
    for place in published_places(checkpoint.config):
        if place.copy_of is None and (place.expert is None or place.parameter in state):
            source, target = checkpoint.tensors[place.name], place.view(state)
            step = rows_per_chunk(place.shape)
            for start in range(0, place.shape[0], step):
                target[start : start + step].copy_(source[start : start + step])


def load_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of a CHECKPOINT; None where it has none. Raises UserError."""
    folder = resolve_checkpoint(path)
    if is_gguf(folder):
        return gguf_tokenizer(folder)
    return Tokenizer.from_file(folder) if (folder / "tokenizer.json").is_file() else None


def save_model(
    model: Decoder,
    path: str | Path,
    *,
    max_shard_bytes: int | float = MAX_SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write a Decoder to a new folder in the published format, in the dtype it has, gate biases in fp32.

    The same weights give the same bytes. `tokenizer_from` is a folder whose tokenizer files come along; without it they
    come from where the model was loaded, if it was. The folder must not exist or be empty; it appears whole or not at
    all. Raises UserError where it is in use, or the disk is full.
    """
    if tokenizer_from is None:
        tokenizer_from = _loaded_from.get(model)
    elif not is_gguf(tokenizer_from) and not any((Path(tokenizer_from) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{tokenizer_from}: no tokenizer.json or other tokenizer file is in it; give a folder with one")
    tensors = dict(stream_published(model))
    save_published(path, model.config, tensors, max_shard_bytes=max_shard_bytes, tokenizer_from=tokenizer_from)


def stream_published(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of all that a checkpoint holds, the MTP's copies too. The tensors are views: nothing is
    copied, and training goes on to change them."""
    return published_views(model.config, model.state_dict())


def published_views(config: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The same from anything laid out like the model's state_dict, such as a snapshot of it. Read backwards it is the
    way in: copying into a view sets the model's own parameter."""
    for place in published_places(config):
        yield place.name, place.view(state).detach()


def save_published(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorRows],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | float = MAX_SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
) -> None:
    """`write_published` into a new folder that appears whole or not at all. Raises UserError."""
    if max_shard_bytes <= 0:
        raise UserError(f"max_shard_bytes {max_shard_bytes} isn't a size; give one above 0, as 5e9")
    path = Path(path)
    final = path.resolve()
    part = final.with_name(f".{final.name}.part-{os.getpid()}")  # beside its place, so that one rename puts it there
    with _disk_errors(path):
        if final.exists() and not final.is_dir():
            raise UserError(f"{path}: a file is there; give a new folder")
        if final.is_dir() and any(final.iterdir()):
            raise UserError(f"{path}: not empty, and nothing is overwritten; give a new folder or empty it")
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            write_published(
                part, config, tensors, dtype=dtype, max_shard_bytes=max_shard_bytes, tokenizer_from=tokenizer_from
            )
            for file in sorted(part.iterdir()):
                sync(file)
            sync(part)
            if final.is_dir():
                final.rmdir()
            part.rename(final)
            sync(part.parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def write_published(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorRows],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | float = MAX_SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
) -> None:
    """Write config.json, the safetensors and the tokenizer's files into an existing folder, neither synced nor renamed.

    Args:
        tensors: every published tensor of `config`, whole or still in files; read by rows, as written.
        dtype: what to round them to; default each tensor's own. Gate biases are fp32 in any case.
        max_shard_bytes: above it shards `model-00001-of-000NN.safetensors` with an index; a larger tensor has its own.
        tokenizer_from: folder whose tokenizer files are copied, as many as it has; or a GGUF file, whose tokenizer is
            written out.

    Raises OSError where the disk is full, UserError for a dtype that published files don't hold.
    """
    places = {place.name: place for place in published_places(config)}
    assert tensors.keys() == places.keys(), "tensors and config don't belong together"
    dtypes = {name: dtype or tensors[name].dtype for name in places}
    dtypes |= {name: torch.float32 for name, place in places.items() if place.is_gate_bias}
    if odd := next((name for name in places if dtypes[name] not in FLOATS), None):
        raise UserError(f"{odd} is {dtypes[odd]}, which published files don't hold; save float32, bfloat16 or float16")
    published = config.replace(quantization_config=None).to_dict()
    published["torch_dtype"] = str(dtypes[EMBEDDING]).removeprefix("torch.")
    _write_json(folder / CONFIG, published)
    sizes = {name: num_bytes(tensors[name], dtypes[name]) for name in sorted(tensors)}
    shards = plan_shards(sizes, max_shard_bytes)
    for shard, names in shards.items():
        write_safetensors(folder / shard, {name: tensors[name] for name in names}, dtypes)
    if len(shards) > 1:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), folder)


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int | float) -> dict[str, list[str]]:
    """File name to the tensors in it: neighbours by name, as many as fit."""
    groups: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files of a checkpoint, as many as it has; a GGUF file's is written out."""
    """The tokenizer's files of a folder, as many as it has, or of a GGUF file."""
    if is_gguf(source):
        if (tokenizer := gguf_tokenizer(source)) is not None:
            tokenizer.save(folder)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk refuses is for the user to mend, not a bug."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free some space, or give a folder on another disk" if full else "give a folder that can be written to"
        raise UserError(f"{path}: can't be saved ({error.strerror}), and nothing was kept; {mend}") from error
