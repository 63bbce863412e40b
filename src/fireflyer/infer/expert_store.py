"""More experts than memory: all of them in their files, as many in memory as a limit allows.

In: where each layer's experts lie, and a number of bytes. Out: an expert's bytes when a layer asks for it, read now
unless they are still there. What is given up for a new one is the expert that was used least of late, over all layers,
the new one among them: plain recency would keep nothing, since every token goes through all layers in turn and comes
back to a layer only when its experts are long gone.

Reading goes past the page map into memory of the store's own, so its limit is true: what the system caches of the files
beside it is free memory to everybody else.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fireflyer.errors import UserError

_ALIGNMENT = 4096
_HALF_LIFE = 64
"""Rounds through the layers after which a use counts half; one a step of the engine."""
_LARGEST = 1e100


class ExpertSource(Protocol):
    """One layer's experts in their files, each of `num_bytes`."""

    @property
    def num_experts(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def read(self, expert: int, into: Tensor) -> None:
        """Read one into (num_bytes,) uint8. Raises UserError where the file ends early."""
        ...


class ExpertStore:
    """All layers' experts within `limit_bytes`. Not for several threads at once.

    hits, misses: uses of an expert that was in memory, and that had to be read.
    """

    def __init__(self, layers: Sequence[ExpertSource], limit_bytes: int) -> None:
        self._layers = layers
        self.expert_bytes = layers[0].num_bytes
        assert all(layer.num_bytes == self.expert_bytes for layer in layers)
        stride = -(-self.expert_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_experts = sum(layer.num_experts for layer in layers)
        self.capacity = min(limit_bytes // stride, self.num_experts)
        """How many are in memory at most."""
        if self.capacity < 1:
            raise UserError(
                f"expert_memory is {limit_bytes:,} bytes, but one expert takes {stride:,}; give at least that"
            )
        self.hits = self.misses = 0
        # Anonymous pages: taken from the system only once an expert is read into them.
        self._pages = mmap.mmap(-1, self.capacity * stride)
        whole = torch.frombuffer(self._pages, dtype=torch.uint8).view(self.capacity, stride)
        self._slots = [slot[: self.expert_bytes] for slot in whole]
        self._slot_of: dict[tuple[int, int], int] = {}
        self._held_by: list[tuple[int, int] | None] = [None] * self.capacity
        most = max(layer.num_experts for layer in layers)
        self._heat = np.zeros((len(layers), most))
        self._slot_heat = np.full(self.capacity, -1.0)  # empty slots are the coldest
        self._use = 1.0
        self._used: set[tuple[int, int]] = set()  # in this round, by none of which it is judged yet
        self._last_layer = -1

    @property
    def resident_bytes(self) -> int:
        """Bytes of the experts in memory."""
        return len(self._slot_of) * self.expert_bytes

    def layer(self, index: int) -> LayerExperts:
        return LayerExperts(self, index)

    def take(self, layer: int, experts: Sequence[int]) -> list[Tensor]:
        """Each expert's bytes, (num_bytes,) uint8, which stay in place until the next call. At most `capacity`."""
        assert len(experts) <= self.capacity
        keys = [(layer, expert) for expert in experts]
        if layer < self._last_layer or not self._used.isdisjoint(keys):
            self._next_round()
        self._last_layer = layer
        self._used.update(keys)
        wanted = {self._slot_of[key] for key in keys if key in self._slot_of}
        slots = []
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is None:
                self.misses += 1
                slot = self._read(key, wanted)
                wanted.add(slot)
            else:
                self.hits += 1
            slots.append(slot)
        return [self._slots[slot] for slot in slots]

    def _read(self, key: tuple[int, int], wanted: set[int]) -> int:
        """Put an expert in place of the coldest that isn't wanted; its slot."""
        heat = self._slot_heat
        if wanted:
            heat = heat.copy()
            heat[list(wanted)] = np.inf
        slot = int(heat.argmin())
        if (gone := self._held_by[slot]) is not None:
            del self._slot_of[gone]
        # Nobody's while it is read: should that fail, nothing half-read is ever handed out.
        self._held_by[slot], self._slot_heat[slot] = None, -1.0
        self._layers[key[0]].read(key[1], self._slots[slot])
        self._held_by[slot], self._slot_heat[slot] = key, self._heat[key]
        self._slot_of[key] = slot
        return slot

    def _next_round(self) -> None:
        """The layers begin anew: what was used since they last did becomes hotter, together, so that within a round
        the experts of layers to come don't look older than those just seen. Each round's uses count more than the
        last's, which is as if all older ones faded."""
        self._use *= 2.0 ** (1 / _HALF_LIFE)
        for key in self._used:
            self._heat[key] += self._use
            if (slot := self._slot_of.get(key)) is not None:
                self._slot_heat[slot] = self._heat[key]
        self._used.clear()
        if self._use > _LARGEST:
            self._heat /= self._use
            self._slot_heat[self._slot_heat > 0] /= self._use
            self._use = 1.0

    def is_resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._slot_of


class LayerExperts:
    """One layer's view of a store: what its module asks (`model.packed_experts.ExpertBytes`)."""

    def __init__(self, store: ExpertStore, index: int) -> None:
        self.store, self._index = store, index

    @property
    def at_once(self) -> int:
        """Experts that one call of `take` may ask for."""
        return self.store.capacity

    def take(self, experts: Sequence[int]) -> list[Tensor]:
        return self.store.take(self._index, experts)

    def in_order(self, experts: Sequence[int]) -> list[int]:
        """Those in memory first, so that reading the others can't drive them out before their turn."""
        return sorted(experts, key=lambda expert: not self.store.is_resident(self._index, expert))
