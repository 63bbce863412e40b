"""Bars in place of words: the decoder's first front end, continuous bars through `inputs_embeds`.

In: windows of bars, (B names, T days, F numbers), and which of them exist. Out: for each bar the trunk's hidden state.
Days without a bar are left out before the decoder sees the sequence, so that a neighbour is the previous *traded* day,
and put back after. The decoder is the package's own and knows nothing of markets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fireflyer.market.heads import affine
from fireflyer.model.decoder import Decoder, TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.model.row_tiles import RowTiles


class BarFrontEnd(nn.Module):
    """Scaled numbers of a bar to an embedding; scale and centre are those of the training span, kept with the model."""

    centre_F: Tensor
    scale_F: Tensor

    def __init__(self, num_inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(num_inputs, hidden_size)
        self.register_buffer("centre_F", torch.zeros(num_inputs))
        self.register_buffer("scale_F", torch.ones(num_inputs))

    def forward(self, bars_BTF: Tensor, tiles: RowTiles | None = None) -> Tensor:
        return affine(self.project, (bars_BTF - self.centre_F) / self.scale_F, tiles)


@dataclass(frozen=True)
class Packing:
    """Where the bars of a window stand once the days without one are left out; what is left at the end is padding."""

    order_BT: Tensor
    """(B, T) int64: the day of each place; bars first, in their order."""
    place_BT: Tensor
    """(B, T) int64: the place of each day, where it has a bar."""
    held_BT: Tensor
    """(B, T) bool: places that hold a bar."""


def packing(bars_BT: Tensor) -> Packing:
    """bars_BT: (B, T) bool, the days that have a bar."""
    order_BT = (~bars_BT).to(torch.int8).argsort(dim=1, stable=True)
    place_BT = (bars_BT.cumsum(1) - 1).clamp(min=0)
    held_BT = torch.arange(bars_BT.shape[1]) < bars_BT.sum(1, keepdim=True)
    return Packing(order_BT, place_BT, held_BT)


def along_time(values: Tensor, index_BT: Tensor) -> Tensor:
    """values (B, T, ...) at other times, (B, T')."""
    shape = (*index_BT.shape, *values.shape[2:])
    return values.gather(1, index_BT.reshape(*index_BT.shape, *(1,) * (values.dim() - 2)).expand(shape))


def read_bars(
    decoder: Decoder,
    front_end: BarFrontEnd,
    bars_BTF: Tensor,
    packed: Packing,
    *,
    num_mtp: int = 0,
    tiles: RowTiles | None = None,
) -> TrunkOutput:
    """The trunk over packed bars; hidden states, MTP's and routing are by place, not by day.

    bars_BTF: by day; days without a bar may hold anything finite or not.
    """
    held_BT = packed.held_BT
    packed_BTF = along_time(bars_BTF, packed.order_BT).masked_fill(~held_BT[..., None], 0.0)
    out = decoder.trunk(inputs_embeds=front_end(packed_BTF, tiles), num_mtp=num_mtp, tiles=tiles)
    return TrunkOutput(out.hidden_BTD, out.mtp_hidden, [of_bars(routing, held_BT) for routing in out.routing])


def of_bars(routing: Routing, held_BT: Tensor) -> Routing:
    """Without the padding, whose experts are no load to be balanced."""
    return replace(routing, indices_NK=routing.indices_NK[held_BT[:, : routing.shape_BT[1]].flatten()])
