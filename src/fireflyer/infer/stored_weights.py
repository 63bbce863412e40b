"""A Decoder whose routed experts stay in the checkpoint's files, behind an `ExpertStore`.

In: a CHECKPOINT, as published, in a GGUF file or packed, and the bytes that experts may take in memory. Out: the model;
all but its routed experts is loaded as ever, and its results are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fireflyer.checkpoint.hf import fill_model
from fireflyer.checkpoint.names import published_places
from fireflyer.checkpoint.packed import load_packed
from fireflyer.checkpoint.published import Checkpoint, list_tensors
from fireflyer.checkpoint.safetensors_file import StoredTensor, TensorRows
from fireflyer.errors import UserError
from fireflyer.infer.expert_store import ExpertStore, LayerExperts
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts, MoE
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.model.stored_experts import StoredExperts


def load_with_store(checkpoint: Checkpoint, dtype: torch.dtype, limit_bytes: int) -> Decoder:
    """From published tensors of any kind, experts converted to `dtype` as they are read. Raises UserError."""
    config = checkpoint.config
    with torch.device("meta"):
        model = Decoder(config)
    sources: dict[str, dict[int, list[TensorRows]]] = {}
    for place in published_places(config):
        if place.expert is not None:
            layer = sources.setdefault(place.parameter.rpartition(".")[0], {})
            layer.setdefault(place.expert, []).append(checkpoint.tensors[place.name])
    names = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    _check(names, checkpoint.folder)
    store = ExpertStore([PublishedExperts(list(sources[name].values()), dtype) for name in names], limit_bytes)
    for index, name in enumerate(names):
        moe = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(moe, MoE)
        moe.experts = StoredExperts(config, dtype, store.layer(index))
    model.to(dtype).to_empty(device="cpu")
    fill_model(model, checkpoint)
    return model


def load_packed_with_store(folder: Path, limit_bytes: int) -> Decoder:
    """From a packed folder, whose experts are read as they lie there. Raises UserError."""
    model, stored = load_packed(folder, leave_experts=True), list_tensors(folder)
    experts = [(name, module) for name, module in model.named_modules() if isinstance(module, PackedExperts)]
    _check([name for name, _ in experts], folder)
    store = ExpertStore([StoredRows(stored[f"{name}.packed"]) for name, _ in experts], limit_bytes)
    for index, (_, module) in enumerate(experts):
        module.store = store.layer(index)
    return model


def find_store(model: Decoder) -> ExpertStore | None:
    """The store behind a model's experts; None where they are all in memory."""
    for module in model.modules():
        if isinstance(module, (StoredExperts, PackedExperts)) and isinstance(module.store, LayerExperts):
            return module.store.store
    return None


def _check(names: Sequence[str], folder: Path) -> None:
    if not names:
        raise UserError(f"{folder}: its model has no routed experts that expert_memory could limit; leave it out")


@dataclass(frozen=True)
class PublishedExperts:
    """A layer's experts as gate, up and down of each, converted while they are read."""

    experts: list[list[TensorRows]]
    dtype: torch.dtype

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def num_bytes(self) -> int:
        return sum(part.shape[0] * part.shape[1] for part in self.experts[0]) * self.dtype.itemsize

    def read(self, expert: int, into: Tensor) -> None:
        numbers = into.view(self.dtype)
        start = 0
        for part in self.experts[expert]:
            stop = start + part.shape[0] * part.shape[1]
            numbers[start:stop].view(part.shape[0], part.shape[1]).copy_(part[:])
            start = stop


@dataclass(frozen=True)
class StoredRows:
    """A layer's experts as the rows of one tensor in a file, read as they are."""

    stored: StoredTensor

    @property
    def num_experts(self) -> int:
        return self.stored.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.stored.shape[1]

    def read(self, expert: int, into: Tensor) -> None:
        self.stored.read_row(expert, into)
