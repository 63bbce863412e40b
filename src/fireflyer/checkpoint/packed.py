"""Packed checkpoints: INT8 or INT4 weights in the form that the kernels read, written once and mapped in place.

In: a checkpoint's published tensors, whole or still in files. Out: a Decoder with packed weights; or a folder of
config.json (its `quantization_config` says what each part is packed as), one safetensors file a layer, and the
tokenizer. Tensors have the names of the packed Decoder's own state, so that loading is nothing but mapping: no byte is
read before it is used, and processes that serve the same folder share its memory.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from fireflyer.checkpoint.names import EMBEDDING, published_places
from fireflyer.checkpoint.published import CONFIG, INDEX, Checkpoint, list_tensors
from fireflyer.checkpoint.safetensors_file import StoredTensor, TensorRows, row_chunks, write_safetensors
from fireflyer.config import ModelConfig
from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.model.packed import PackedFormat, packed_decoder
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.numerics.integer import Kind, pack
from fireflyer.numerics.linear import PackedLinear

ALIGNMENT = 64
"""Of each file's first tensor: what the widest registers like."""


@dataclass(frozen=True)
class PackedPlan:
    """What a packed folder will hold: `shards[file][tensor]`, computed from the source when its rows are asked for."""

    config: ModelConfig
    shards: dict[str, dict[str, TensorRows]]

    def write(self, folder: Path) -> None:
        """Write all but the tokenizer into an existing folder, neither synced nor renamed. Raises OSError."""
        for name in self.shards:
            self.write_shard(folder / name)
        for name, content in ((CONFIG, self.config_json()), (INDEX, self.index())):
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            (folder / name).write_text(text, encoding="utf-8")

    def write_shard(self, path: Path) -> None:
        """Write the file of this name. Raises OSError."""
        tensors = self.shards[path.name]
        write_safetensors(path, tensors, alignment=ALIGNMENT)

    def index(self) -> dict[str, object]:
        """What model.safetensors.index.json says."""
        total = sum(prod(t.shape) * t.dtype.itemsize for tensors in self.shards.values() for t in tensors.values())
        weight_map = {name: file for file, tensors in self.shards.items() for name in tensors}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}

    def config_json(self) -> dict[str, object]:
        """What config.json says."""
        return {**self.config.to_dict(), "torch_dtype": "float32"}


def plan_packed(config: ModelConfig, tensors: Mapping[str, TensorRows], kind: Kind) -> PackedPlan:
    """The packed form of a checkpoint's published tensors; nothing is read yet."""
    fmt = PackedFormat(kind)
    files: dict[str, dict[str, TensorRows]] = {}
    for name, rows in _packed_rows(config, tensors, fmt).items():
        files.setdefault(_part(name), {})[name] = rows
    count = len(files)
    shards = {f"model-{i:05d}-of-{count:05d}.safetensors": part for i, part in enumerate(files.values(), start=1)}
    return PackedPlan(config.replace(quantization_config=fmt.to_dict()), shards)


def pack_checkpoint(checkpoint: Checkpoint, kind: Kind | PackedFormat) -> Decoder:
    """A checkpoint's Decoder with packed weights. Memory stays within the packed model and one tensor of the source."""
    fmt = kind if isinstance(kind, PackedFormat) else PackedFormat(kind)
    model = packed_decoder(checkpoint.config, fmt)
    for name, rows in _packed_rows(checkpoint.config, checkpoint.tensors, fmt).items():
        whole = torch.empty(rows.shape, dtype=rows.dtype)
        start = 0
        for chunk in row_chunks(rows):
            whole[start : start + len(chunk)].copy_(chunk)
            start += len(chunk)
        _put(model, name, whole)
    return model


def packed_kind(folder: Path) -> Kind | None:
    """What a folder's weights are packed as; None where they aren't. Raises UserError."""
    if not folder.is_dir():
        return None  # a GGUF file
    config = ModelConfig.from_file(folder)
    return _format(config, folder).weights if config.is_packed else None


def _format(config: ModelConfig, folder: Path) -> PackedFormat:
    return PackedFormat.from_dict(config.quantization_config or {}, str(folder / CONFIG))


def load_packed(folder: Path, *, leave_experts: bool = False) -> Decoder:
    """The Decoder of a packed folder, its weights mapped in place. Raises UserError, naming file and tensor.

    leave_experts: check the routed experts, but leave them unset, for a store that reads them itself.
    """
    config = ModelConfig.from_file(folder)
    model = packed_decoder(config.replace(quantization_config=None), _format(config, folder))
    wanted = model.state_dict()
    stored = list_tensors(folder)
    for name in wanted:
        if name not in stored:
            raise UserError(f"{folder}: {name} is missing, which {CONFIG} asks for; convert the checkpoint anew")
    mappings: dict[Path, mmap.mmap] = {}
    for name, source in stored.items():
        target = wanted.get(name)
        if target is None:
            raise UserError(f"{source.path}: {shown(name, 120)} has no place in the model of {CONFIG}; convert it anew")
        if source.shape != tuple(target.shape) or source.dtype != target.dtype:
            raise UserError(
                f"{source.path}: {name} is {source.dtype} {source.shape}, but {CONFIG} makes it {target.dtype} "
                f"{tuple(target.shape)}; convert the checkpoint anew"
            )
        if not (leave_experts and isinstance(model.get_submodule(name.rpartition(".")[0]), PackedExperts)):
            _put(model, name, _mapped(source, mappings))
    return model


def _mapped(source: StoredTensor, mappings: dict[Path, mmap.mmap]) -> Tensor:
    """The tensor where it lies in its file; the mapping lives as long as its tensors do."""
    if source.path not in mappings:
        with source.path.open("rb") as file:
            mappings[source.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it can't be written to
        flat = torch.frombuffer(
            mappings[source.path], dtype=source.dtype, count=prod(source.shape), offset=source.offset
        )
    return flat.view(source.shape)


def _put(model: Decoder, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    is_parameter = leaf in dict(module.named_parameters(recurse=False))
    setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _part(name: str) -> str:
    """What shares a file: a layer, or all that belongs to none."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] in ("layers", "mtp") else ""


@dataclass(frozen=True)
class _Kept:
    """A tensor that isn't packed, rounded to `dtype`."""

    source: TensorRows
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.source[rows].to(self.dtype)


@dataclass(frozen=True)
class _Packed:
    """Rows of packed bytes, (N, bytes): each holds matrices one behind the other, of sources one below the other."""

    rows: Sequence[Sequence[Sequence[TensorRows]]]
    kind: Kind
    num_bytes: int
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), self.num_bytes

    def __getitem__(self, rows: slice, /) -> Tensor:
        chosen = self.rows[rows]
        blocks = [torch.cat([self._block(sources) for sources in matrices]) for matrices in chosen]
        return torch.stack(blocks) if blocks else torch.empty(0, self.num_bytes, dtype=torch.uint8)

    def _block(self, sources: Sequence[TensorRows]) -> Tensor:
        try:
            return pack(torch.cat([source[:] for source in sources]) if len(sources) > 1 else sources[0][:], self.kind)
        except ValueError as error:
            raise UserError(f"{_described(sources)}: can't be packed: {error}") from None


def _described(sources: Sequence[TensorRows]) -> str:
    """The file and name of what still lies in one."""
    return ", ".join(f"{s.path}: {s.name}" if isinstance(s, StoredTensor) else "a tensor" for s in sources)


def _packed_rows(config: ModelConfig, tensors: Mapping[str, TensorRows], fmt: PackedFormat) -> dict[str, TensorRows]:
    """Every tensor of the packed Decoder's state by name."""
    sources: dict[tuple[str, int | None], list[TensorRows]] = {}
    for place in published_places(config):
        if place.copy_of is None:
            sources.setdefault((place.parameter, place.expert), []).append(tensors[place.name])
    return dict(_state_rows(packed_decoder(config, fmt), sources))


def _state_rows(
    model: Decoder, sources: Mapping[tuple[str, int | None], list[TensorRows]]
) -> Iterator[tuple[str, TensorRows]]:
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            num_experts, num_bytes = module.packed.shape
            rows = [
                [
                    *([half] for half in sources[f"{name}.gate_up_proj", expert]),
                    sources[f"{name}.down_proj", expert],
                ]
                for expert in range(num_experts)
            ]
            yield f"{name}.packed", _Packed(rows, module.shapes[0].kind, num_bytes)
        elif isinstance(module, PackedLinear):
            own = sources.get((f"{name}.weight", None)) or sources[EMBEDDING, None]  # a head may be the embedding's
            yield f"{name}.packed", _Packed([[own]], module.shape.kind, module.shape.num_bytes)
        else:
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                full = f"{name}.{leaf}"
                yield full, _Kept(sources[full, None][0], tensor.dtype)
