"""A whole decoder, the same on every rank, becomes this rank's share of it: FSDP2 over the data ranks, experts by ep.

In: a Decoder with its weights, and the ranks. Out: the same module, whose parameters are torch's DTensors (an expert's
over the ranks with the same experts), gathered layer by layer as they are needed. What each rank's loss gives is
summed, never averaged: the losses are shares of the whole batch's (train/losses.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fireflyer.model.block import Block
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts, MoE
from fireflyer.model.fp8_layers import Fp8Experts
from fireflyer.model.mtp import MTPModule
from fireflyer.parallel.expert import ParallelExperts, ParallelFp8Experts
from fireflyer.parallel.ranks import Many


def shard_(model: Decoder, ranks: Many, roots: Sequence[nn.Module]) -> None:
    """Keep this rank's share of the weights, in place. roots: what is called as a whole, the model or its stages."""
    layout = ranks.layout
    keep = layout.zero < 3
    wrapped: list[FSDPModule] = []
    for block in blocks(model):
        if layout.ep > 1 and isinstance(block.mlp, MoE):
            experts = block.mlp.experts
            assert isinstance(experts, Experts)
            group = ranks.mesh["ep"].get_group()
            block.mlp.experts = (
                ParallelFp8Experts(model.config, experts, group)
                if isinstance(experts, Fp8Experts)
                else ParallelExperts(model.config, experts, group)
            )
            wrapped.append(fully_shard(block.mlp.experts, mesh=ranks.mesh["copies"], reshard_after_forward=not keep))
    for module in (*model.model.layers, *model.model.mtp):
        if isinstance(module, Block | MTPModule):
            wrapped.append(fully_shard(module, mesh=ranks.data, reshard_after_forward=not keep))
    wrapped += [fully_shard(root, mesh=ranks.data, reshard_after_forward=False) for root in roots]
    if isinstance(model, FSDPModule):
        for method in ("trunk", "trunk_of"):
            register_fsdp_forward_method(model, method)
    for module in wrapped:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum that scales


def blocks(model: Decoder) -> Iterator[Block]:
    """Main layers, then those of the MTP modules."""
    for module in model.modules():
        if isinstance(module, Block):
            yield module


def before_backward(model: nn.Module, layout_zero: int, last: bool) -> None:
    """With zero = 1 gradients stay whole until the batch's last part, which shares them out once."""
    if isinstance(model, FSDPModule) and layout_zero == 1:
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def settle(model: nn.Module) -> None:
    """After a forward pass that no backward followed: no whole copy is left that a step would make stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(name: str, tensor: Tensor, ranks: Many) -> Tensor:
    """All of a parameter, or of what has its shape, on every rank. Collective. name: the parameter's."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    if not is_expert(name, ranks):
        return full
    group = ranks.mesh["ep"].get_group()
    parts = [torch.empty_like(full) for _ in range(group.size())]
    torch.distributed.all_gather(parts, full.contiguous(), group=group)
    return torch.cat(parts)


def as_part(parameter: Tensor, part: Tensor) -> Tensor:
    """A tensor laid out as a parameter is, of what of it lies here."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def share_of(name: str, full: Tensor, ranks: Many) -> Tensor:
    """The part of a whole parameter that this rank holds, as `shard_` cuts it."""
    if is_expert(name, ranks):
        full = full.chunk(ranks.layout.ep)[ranks.mesh["ep"].get_local_rank()]
        mesh = ranks.mesh["copies"]
    else:
        mesh = ranks.data
    parts = full.chunk(mesh.size())
    place = mesh.get_local_rank()
    return parts[place] if place < len(parts) else full[:0]


def is_expert(name: str, ranks: Many) -> bool:
    """Whether a parameter is spread by ep."""
    return ranks.layout.ep > 1 and ".mlp.experts." in name
