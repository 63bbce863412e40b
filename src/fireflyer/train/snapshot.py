"""A run's state at one step: copied in an instant, written at leisure, and put back to the bit.

In: model, optimizer, average and counters. Out: a checkpoint folder in the published format with `trainer.*` beside it;
and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fireflyer.checkpoint.adapter import write_adapter
from fireflyer.checkpoint.hf import copy_tokenizer, published_views, write_published
from fireflyer.checkpoint.names import published_places
from fireflyer.checkpoint.trainer_state import EMA_PREFIX, read_trainer_state, write_trainer_state
from fireflyer.config import ModelConfig
from fireflyer.model.decoder import Decoder
from fireflyer.parallel.ranks import ALONE, Alone, Ranks
from fireflyer.train.lora import adapter_pairs
from fireflyer.train.optimizer import DecoderOptimizer, load_optimizer_tensors, optimizer_tensors

_OPTIMIZER = "optimizer."
_CPU_RNG = "rng.cpu"
_CUDA_RNG = "rng.cuda"


@dataclass(frozen=True)
class Snapshot:
    """Copies of everything; training may go on at once."""

    config: ModelConfig
    weights: dict[str, Tensor]
    trainer: dict[str, Tensor]
    state: dict[str, Any]
    tokenizer_from: Path
    adapter: tuple[float, str] | None = None
    """α and the base checkpoint, where adapters are trained: then `weights` are theirs alone."""

    def write(self, folder: Path) -> None:
        """Write the checkpoint's files into an empty folder."""
        if self.adapter is not None:
            write_adapter(folder, adapter_pairs(self.config, self.weights), *self.adapter)
            copy_tokenizer(self.tokenizer_from, folder)
        else:
            tensors = dict(published_views(self.config, self.weights))
            write_published(folder, self.config, tensors, tokenizer_from=self.tokenizer_from)
        write_trainer_state(folder, self.trainer, self.state)


def take_snapshot(
    model: Decoder,
    optimizer: DecoderOptimizer,
    average: dict[str, Tensor],
    state: dict[str, Any],
    tokenizer_from: Path,
    adapter: tuple[float, str] | None = None,
    ranks: Ranks = ALONE,
) -> Snapshot:
    """Copy the weights (fp32, as trained), optimizer moments, averaged weights and RNG. `state` is JSON-able.

    adapter: as `Snapshot` has it; the frozen weights are then not copied.
    ranks: where others hold parts of all this, the first one's snapshot has the whole, and the others' are empty.
    """

    def copy(name: str, tensor: Tensor) -> Tensor:
        whole = ranks.whole(name, tensor)
        return _copy(whole) if ranks.leads else whole.new_empty(0)

    moments = optimizer_tensors(optimizer).items()
    trainer = ranks.of_all_layers({f"{_OPTIMIZER}{name}": copy(name, tensor) for name, tensor in moments})
    named = dict(model.named_parameters())
    if average and not isinstance(ranks, Alone):
        average = {name: copy(name, ranks.as_part(named[name], part)) for name, part in average.items()}
        average = ranks.of_all_layers(average)
    if ranks.is_first:
        trainer |= {f"{EMA_PREFIX}{name}": _copy(view) for name, view in _average_views(model.config, average)}
    trainer[_CPU_RNG] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        trainer[_CUDA_RNG] = torch.cuda.get_rng_state()
    kept = {name for name, parameter in named.items() if parameter.requires_grad}
    live = model.state_dict()
    weights = {name: copy(name, tensor) for name, tensor in live.items() if adapter is None or name in kept}
    weights = ranks.of_all_layers(weights)
    return Snapshot(model.config, weights, trainer, state, tokenizer_from, adapter)


def restore(
    folder: Path, model: Decoder, optimizer: DecoderOptimizer, average: dict[str, Tensor], ranks: Ranks = ALONE
) -> dict[str, Any]:
    """Put back what `take_snapshot` took, but for the weights, which `load_model` reads. Returns the state.

    `average` is filled where the checkpoint has one. Raises UserError for tensors of another model or optimizer.
    """
    tensors, state = read_trainer_state(folder)
    moments = {name[len(_OPTIMIZER) :]: tensor for name, tensor in tensors.items() if name.startswith(_OPTIMIZER)}
    if ranks.pipeline is not None:
        here = optimizer_tensors(optimizer).keys()  # of other layers other ranks take theirs
        moments = {name: tensor for name, tensor in moments.items() if name in here}
    load_optimizer_tensors(optimizer, moments, ranks)
    if any(name.startswith(EMA_PREFIX) for name in tensors):
        shapes = {name: ranks.whole_shape(name, parameter) for name, parameter in model.named_parameters()}
        whole = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
        for name, view in _average_views(model.config, whole):
            view.copy_(tensors[EMA_PREFIX + name])
        average.update({name: ranks.share_of(name, tensor) for name, tensor in whole.items()})
    torch.set_rng_state(tensors[_CPU_RNG])
    if _CUDA_RNG in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[_CUDA_RNG])
    return state


def _average_views(config: ModelConfig, average: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """(published name, view) of all averaged weights that are here, each once; gate biases have no average."""
    if not average:
        return []
    places = [place for place in published_places(config) if place.copy_of is None and not place.is_gate_bias]
    return [(place.name, place.view(average).detach()) for place in places if place.parameter in average]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
