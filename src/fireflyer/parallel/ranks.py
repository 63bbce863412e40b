"""The ranks of a training run as its loop sees them: which part of a batch is whose, sums over all, and who agrees.

`Alone` is a process by itself and costs nothing. `Many` speaks to the others through torch.distributed, with a timeout
on everything. Every method of `Many` is collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fireflyer.errors import UserError
from fireflyer.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from fireflyer.model.decoder import Decoder
    from fireflyer.parallel.context import SequencePart
    from fireflyer.parallel.pipeline import Pipeline
    from fireflyer.parallel.stages import PipelineSettings

T = TypeVar("T")

TIMEOUT_S = 600
"""How long a rank waits for the others, in each exchange; FIREFLYER_TIMEOUT_S in the environment changes it."""


class Alone:
    """One process: everything is here already."""

    layout = Layout()
    is_first = True
    """Whether this rank speaks for all, and writes."""
    leads = True
    """Whether this rank speaks for those that hold other parts of the same layers."""
    rank = 0
    pipeline: Pipeline | None = None
    """What takes batches forward and backward, where ranks hold other layers."""

    def share(self, rows: int) -> slice:
        """The rows of a batch that this rank computes."""
        return slice(0, rows)

    def summed(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's sum over the ranks."""
        return values

    def counted(self, counts: dict[int, Tensor]) -> dict[int, Tensor]:
        """By layer, (E,) int64: the sum over the ranks."""
        return counts

    def local(self, tensor: Tensor) -> Tensor:
        """What of a parameter, or of its gradient, lies here."""
        return tensor

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients of the model together, from what lies here."""
        return torch.nn.utils.get_total_norm(gradients)

    def part_of(self, num_tokens: int, device: str) -> SequencePart | None:
        """Which tokens of a sequence are this rank's; None: all."""
        return None

    def prepare(self, model: Decoder, pipeline: PipelineSettings) -> None:
        """Keep this rank's share of the weights, in place."""

    def updated(self) -> None:
        """Told when the optimizer has changed the weights."""

    def before_backward(self, model: Decoder, last: bool) -> None:
        """Told before the backward pass of each part of a batch, the last or not."""

    def settle(self, model: Decoder) -> None:
        """Told after forward passes that no backward followed."""

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """All of a parameter, by its name, or of what is laid out as it is."""
        return tensor

    def share_of(self, name: str, full: Tensor) -> Tensor:
        """What of a whole parameter lies here."""
        return full

    def whole_shape(self, name: str, parameter: Tensor) -> torch.Size:
        """Of all of a parameter."""
        return parameter.shape

    def as_part(self, parameter: Tensor, part: Tensor) -> Tensor:
        """What lies here of something in a parameter's shape, as `whole` takes it."""
        return part

    def each(self, check: Callable[[], T]) -> T:
        """`check()` on every rank; where any raises UserError, all raise the lowest rank's."""
        return check()

    def on_first(self, make: Callable[[], T]) -> T | None:
        """`make()` on the first rank alone, None on the others; all raise its UserError."""
        return make()

    def from_first(self, value: T) -> T:
        """The first rank's value."""
        return value

    def told(self, word: str | None) -> str | None:
        """What the lowest rank with something to say says."""
        return word

    def of_all_layers(self, by_layer: dict[T, Tensor]) -> dict[T, Tensor]:
        """What the ranks that lead have of their layers, together: on the first, on the others maybe not all."""
        return by_layer

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return flag

    def first(self, error: UserError | None) -> None:
        """Raise what any rank has met, the lowest rank's, on all of them; nothing where none has met anything."""
        if error is not None:
            raise error

    def same(self, what: dict[str, str]) -> None:
        """Raise UserError where the ranks' fingerprints differ. what: fingerprint by the name of what it is of."""

    def close(self) -> None:
        """Leave the others."""


class Many:
    """One rank of several. Its meshes: `data` all ranks with the same layers, `experts` those with the same experts."""

    def __init__(self, layout: Layout, device: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.layout = layout
        self.rank = torch.distributed.get_rank()
        self.is_first = self.rank == 0
        kind = device.partition(":")[0]
        self.mesh: DeviceMesh = init_device_mesh(
            kind, (layout.pp, layout.expert_copies, layout.ep), mesh_dim_names=("pp", "copies", "ep")
        )
        self.data: DeviceMesh = self.mesh["copies", "ep"]._flatten("data")
        self.leads = self.data.get_local_rank() == 0
        self._context: ProcessGroup | None = None
        if layout.cp > 1:
            by_part = init_device_mesh(kind, (layout.pp, layout.dp, layout.cp), mesh_dim_names=("pp", "dp", "cp"))
            self._context = by_part["cp"].get_group()
        self.pipeline: Pipeline | None = None
        self._moe_layers: tuple[list[int], int] | None = None
        """All of them, and their number of experts, where this rank has some alone."""
        self._device = torch.device(kind) if kind == "cpu" else torch.device(kind, torch.cuda.current_device())

    def share(self, rows: int) -> slice:
        each = rows // self.layout.dp
        place = self.data.get_local_rank() // self.layout.cp
        return slice(place * each, (place + 1) * each)

    def summed(self, values: dict[str, float]) -> dict[str, float]:
        names = sorted(values)
        total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def counted(self, counts: dict[int, Tensor]) -> dict[int, Tensor]:
        layers = sorted(counts)
        if self._moe_layers is not None:
            layers, num_experts = self._moe_layers
            none = torch.zeros(num_experts, dtype=torch.int64, device=self._device)
            counts = {layer: counts.get(layer, none) for layer in layers}
        if not layers:
            return counts
        total = torch.stack([counts[layer] for layer in layers]).to(self._device)
        torch.distributed.all_reduce(total)
        return dict(zip(layers, total.unbind(), strict=True))

    def local(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Every number of the model's gradient lies on one rank alone, so squares simply add up."""
        square = torch.nn.utils.get_total_norm(gradients).to(torch.float64).square() if gradients else torch.zeros(())
        square = square.to(self._device, torch.float64)
        torch.distributed.all_reduce(square)
        return square.sqrt()

    def part_of(self, num_tokens: int, device: str) -> SequencePart | None:
        from fireflyer.parallel.context import sequence_part

        return None if self._context is None else sequence_part(num_tokens, self._context, device)

    def prepare(self, model: Decoder, pipeline: PipelineSettings) -> None:
        from fireflyer.parallel.shard import shard_

        if self.layout.pp == 1:
            shard_(model, self, [model])
            return
        from fireflyer.parallel.pipeline import Pipeline

        config = model.config
        layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
        self._moe_layers = [layer for layer in layers if config.is_moe(layer)], config.n_routed_experts
        self.pipeline = Pipeline(model, pipeline, self.mesh["pp"].get_group(), self._context)
        shard_(model, self, self.pipeline.stages)

    def updated(self) -> None:
        if self.pipeline is not None:
            self.pipeline.after_update()

    def before_backward(self, model: Decoder, last: bool) -> None:
        from fireflyer.parallel.shard import before_backward

        before_backward(model, self.layout.zero, last)

    def settle(self, model: Decoder) -> None:
        from fireflyer.parallel.shard import settle

        for root in [model] if self.pipeline is None else self.pipeline.stages:
            settle(root)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        from fireflyer.parallel.shard import whole

        return whole(name, tensor, self)

    def share_of(self, name: str, full: Tensor) -> Tensor:
        from fireflyer.parallel.shard import share_of

        return share_of(name, full, self)

    def whole_shape(self, name: str, parameter: Tensor) -> torch.Size:
        from fireflyer.parallel.shard import is_expert

        first, *others = parameter.shape
        return torch.Size((first * self.layout.ep if is_expert(name, self) else first, *others))

    def as_part(self, parameter: Tensor, part: Tensor) -> Tensor:
        from fireflyer.parallel.shard import as_part

        return as_part(parameter, part)

    def each(self, check: Callable[[], T]) -> T:
        return share_error(check)

    def on_first(self, make: Callable[[], T]) -> T | None:
        return share_error(make if self.is_first else lambda: None)

    def from_first(self, value: T) -> T:
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def told(self, word: str | None) -> str | None:
        return next((said for said in _gathered(word) if said is not None), None)

    def of_all_layers(self, by_layer: dict[T, Tensor]) -> dict[T, Tensor]:
        if self.layout.pp == 1 or not self.leads:
            return by_layer
        from fireflyer.parallel.pipeline import gathered

        return gathered(by_layer, self.mesh["pp"].get_group(), self._device)

    def any(self, flag: bool) -> bool:
        return _any(flag)

    def first(self, error: UserError | None) -> None:
        _raise_first(error)

    def same(self, what: dict[str, str]) -> None:
        agree(what)

    def close(self) -> None:
        torch.distributed.destroy_process_group()


Ranks = Alone | Many
ALONE = Alone()


def meet() -> None:
    """Meet the ranks that the launcher started beside this one. Raises UserError where that can't be."""
    if torch.distributed.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=float(os.environ.get("FIREFLYER_TIMEOUT_S", TIMEOUT_S)))
    try:
        torch.distributed.init_process_group(backend, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"rank {os.environ.get('RANK', '?')} can't meet the others at {place}: {reason}; give another port"
        ) from error


def share_error(check: Callable[[], T]) -> T:
    """`check()`; where it raises UserError on any rank, all of them raise the lowest rank's."""
    result: list[T] = []
    error = None
    try:
        result.append(check())
    except UserError as met:
        error = met
    _raise_first(error)
    return result[0]


def agree(what: dict[str, str]) -> None:
    """Meet the launcher's other ranks; raises UserError where fingerprints differ, by the name of what they are of."""
    meet()
    found = _gathered(what)
    for rank, theirs in enumerate(found):
        for name, fingerprint in found[0].items():
            if theirs.get(name) != fingerprint:
                raise UserError(
                    f"rank {rank} has another {name} than rank 0; give every rank the same command and files"
                )


def open_ranks(layout: Layout, device: str) -> Ranks:
    """This rank's place in a layout of all that were started."""
    if layout.world == 1:
        return Alone()
    meet()
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return Many(layout, device)


def lost(error: RuntimeError) -> bool:
    """Whether it tells of another rank that is gone or silent."""
    text = str(error)
    return isinstance(error, torch.distributed.DistError) or any(word in text for word in _LOST)


_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL")


def _any(flag: bool) -> bool:
    flags = torch.tensor([float(flag)])
    torch.distributed.all_reduce(flags)
    return bool(flags.item())


def _raise_first(error: UserError | None) -> None:
    if not _any(error is not None):
        return
    found = _gathered(None if error is None else str(error))
    for rank, text in enumerate(found):
        if text is not None:
            everywhere = all(other == text for other in found)
            raise UserError(text if everywhere or rank == 0 else f"rank {rank}: {text}") from error


def _gathered(value: T) -> list[T]:
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
