"""The latents of all sequences in blocks of slots. In: the latents of a call's rows and where they go. Out: per group
of rows, the latents of the sequences they belong to, dense, for attention to read.

A sequence whose blocks lie side by side is read in place; others are gathered, block by block, into a dense copy for
the layer at hand. As int8, a latent and its rope key have a scale each, per token: their sizes have nothing to do with
each other.

Shapes: C numbers of a token, the first L of them its latent, the others its rope key; N new tokens; X blocks.
"""

from __future__ import annotations

import itertools
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fireflyer.infer.block_pool import NULL_BLOCK
from fireflyer.infer.options import CacheDtype

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def cache_torch_dtype(cache_dtype: CacheDtype, model_dtype: torch.dtype) -> torch.dtype:
    """What a slot's numbers are kept as."""
    return model_dtype if cache_dtype == "auto" else _DTYPES[cache_dtype]


def slot_bytes(num_layers: int, width: int, dtype: torch.dtype) -> int:
    """Memory of one token in all layers, scales included."""
    return num_layers * (width * dtype.itemsize + (8 if dtype == torch.int8 else 0))


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had on a device; on a CPU what the system and the process's group leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 if hasattr(os, "sysconf") else 4 << 30
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(free, 0)


class PagedCache:
    """Slots of all layers; MTP layers have their places after the main ones.

    Args:
        num_layers: main layers, and the MTP layers that draft.
        num_blocks: blocks of `block_size` slots, the null block included.
        width, latent: C and L.
        dtype: torch.int8, or a floating type.
        read_dtype: what attention reads.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        width: int,
        latent: int,
        dtype: torch.dtype,
        read_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self._latent, self._read_dtype, self.device = block_size, latent, read_dtype, device
        self.slots = _lazy_zeros((num_layers, num_blocks, block_size, width), dtype, device)
        self.scales = _lazy_zeros((num_layers, num_blocks, block_size, 2), torch.float32, device)
        self._quantised = dtype == torch.int8
        # Indexing a tensor by layer costs as much as a small product; a list does not.
        self._layers = list(self.slots.unbind())
        self._scale_layers = list(self.scales.unbind())

    def view(self, tables: Sequence[Sequence[int]], slots: Sequence[int]) -> PagedView:
        """The sequences of one group.

        Args:
            tables: each sequence's blocks, as many as hold all that its rows may see.
            slots: where each new token goes, (block * block_size + place), sequence by sequence.
        """
        return PagedView(self, tables, slots)

    def write(self, layer: int, target: Tensor | slice, latent_NC: Tensor) -> None:
        latent_NC = latent_NC.detach()
        if self._quantised:
            latent_NC, scale_N2 = quantise(latent_NC, self._latent)
            self._scale_layers[layer].view(-1, 2)[target] = scale_N2
        self._layers[layer].view(-1, latent_NC.shape[-1])[target] = latent_NC.to(self.slots.dtype)

    def read(self, layer: int, blocks: Tensor | slice, batch: int) -> Tensor:
        """(B, S, C) in the dtype that attention reads: all slots of the blocks, B tables one after the other."""
        kept_XC = _pick(self._layers[layer], blocks)
        if self._quantised:
            kept_XC = dequantise(kept_XC, _pick(self._scale_layers[layer], blocks), self._latent, self._read_dtype)
        return kept_XC.view(batch, -1, kept_XC.shape[-1]).to(self._read_dtype)

    def wipe(self, blocks: Sequence[int]) -> None:
        """Zero blocks whose numbers may not be finite: masked or not, they would spread to who has them next."""
        index = torch.tensor(blocks, device=self.device)
        self.slots[:, index] = 0
        self.scales[:, index] = 0


class PagedView:
    """What one group's attention sees of the cache: the decoder's `LatentStore`."""

    def __init__(self, cache: PagedCache, tables: Sequence[Sequence[int]], slots: Sequence[int]) -> None:
        self._cache, self._batch = cache, len(tables)
        width = max(map(len, tables))
        padded = [block for table in tables for block in (*table, *(NULL_BLOCK,) * (width - len(table)))]
        self._blocks = _index(padded, cache.device)
        self._target = _index(slots, cache.device)

    def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
        """Store a call's latents; return the first `num_slots` slots of each sequence, (B, S, C)."""
        self._cache.write(layer_index, self._target, latent_BTC.flatten(0, 1))
        return self._cache.read(layer_index, self._blocks, self._batch)[:, :num_slots]


def quantise(latent_NC: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """int8 (N, C) and fp32 scales (N, 2), one for the first `latent` numbers and one for the others; symmetric."""
    wide_NC = latent_NC.float()
    parts = wide_NC.split((latent, wide_NC.shape[-1] - latent), dim=-1)
    scale_N2 = torch.stack([part.abs().amax(-1) for part in parts], dim=-1) / 127
    inverse_N2 = torch.where(scale_N2 > 0, 1 / scale_N2, 0.0)
    scaled = [part * inverse_N2[:, i : i + 1] for i, part in enumerate(parts)]
    return torch.cat(scaled, dim=-1).round_().to(torch.int8), scale_N2


def dequantise(number_NC: Tensor, scale_N2: Tensor, latent: int, dtype: torch.dtype) -> Tensor:
    """The reverse, to half a scale; any leading shape."""
    wide = number_NC.to(torch.float32)
    wide[..., :latent] *= scale_N2[..., :1]
    wide[..., latent:] *= scale_N2[..., 1:]
    return wide.to(dtype)


def _index(numbers: Sequence[int], device: torch.device) -> Tensor | slice:
    """Numbers that follow one another as a slice, which costs no gathering, others as a tensor."""
    first, count = numbers[0], len(numbers)
    if numbers[-1] - first == count - 1 and all(b - a == 1 for a, b in itertools.pairwise(numbers)):
        return slice(first, first + count)
    return torch.tensor(numbers, device=device)


def _pick(layer: Tensor, blocks: Tensor | slice) -> Tensor:
    return layer[blocks] if isinstance(blocks, slice) else layer.index_select(0, blocks)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose memory is taken only where they are written: a cache is as large as it may become."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
