"""Who has which block of the cache. In: requests for blocks. Out: block numbers, each with a count of its users.

A block is *empty*, *used* (by one answer or by several that share a beginning), or *idle*: unused, but findable by its
tokens. Empty blocks are given away first; then the idle one that was used longest ago. Block 0 is never given away: it
stays all zeros and fills the gaps of tables of unequal length.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

NULL_BLOCK = 0


class BlockPool:
    """Blocks 1 to num_blocks - 1, each of `block_size` slots. Work and memory go by the blocks that were ever used."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.on_reuse: Callable[[int], None] = _nothing
        """Called with an idle block that is about to be filled anew."""
        self._users: dict[int, int] = {}
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._returned: set[int] = set()
        """Empty blocks that were used before; those from `_untouched` on never were."""
        self._heap: list[int] = []
        """The returned ones, the smallest first, among numbers that are no longer empty."""
        self._untouched = 1

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be given away: empty and idle ones."""
        return len(self._returned) + self.num_blocks - self._untouched + len(self._idle)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return len(self._users)

    def num_users(self, block: int) -> int:
        return self._users.get(block, 0)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks for one user, or None and nothing where there are not so many.

        The neighbour of the block before is preferred (`after` for the first): a lone sequence whose blocks lie side by
        side is read without a copy.
        """
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            after = self._take(after)
            blocks.append(after)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more user for each; idle ones are idle no longer."""
        for block in blocks:
            if block not in self._users:
                del self._idle[block]
            self._users[block] = self._users.get(block, 0) + 1

    def release(self, blocks: Sequence[int]) -> None:
        """One user less for each. The last blocks of a sequence go first when memory is short: they serve fewest."""
        for block in reversed(blocks):
            users = self._users[block] - 1
            if users:
                self._users[block] = users
                continue
            del self._users[block]
            if block in self._kept:
                self._idle[block] = None
            else:
                self._return(block)

    def keep(self, block: int) -> None:
        """From now on this used block can be found by its tokens: it will be idle, not empty, when it is released."""
        self._kept.add(block)

    def discard(self, block: int) -> None:
        """The block can be found no longer."""
        self._kept.remove(block)
        if block in self._idle:
            del self._idle[block]
            self._return(block)

    def kept_blocks(self) -> set[int]:
        return set(self._kept)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless users are those of `tables`, the blocks of every answer, and none is lost."""
        users = Counter(block for table in tables for block in table)
        wrong = {block for block in users.keys() | self._users.keys() if users[block] != self._users.get(block, 0)}
        assert not wrong, f"block pool: blocks {sorted(wrong)[:5]} have other users than are counted"
        used, idle = set(users), set(self._idle)
        twice = (used & idle) | (used & self._returned) | (idle & self._returned)
        assert not twice, f"block pool: blocks {sorted(twice)[:5]} are in two states"
        assert used | idle | self._returned == set(range(1, self._untouched)), "block pool: blocks are lost"
        assert idle == self._kept - used, "block pool: idle blocks that can't be found, or the reverse"

    def _take(self, after: int | None) -> int:
        block = self._empty_block(after)
        if block is None:
            block, _ = self._idle.popitem(last=False)
            self._kept.remove(block)
            self.on_reuse(block)
        self._users[block] = 1
        return block

    def _empty_block(self, after: int | None) -> int | None:
        neighbour = None if after is None else after + 1
        if neighbour in self._returned:
            self._returned.remove(neighbour)
            return neighbour
        if neighbour == self._untouched < self.num_blocks:
            self._untouched += 1
            return neighbour
        while self._heap:
            block = heapq.heappop(self._heap)
            if block in self._returned:
                self._returned.remove(block)
                return block
        if self._untouched == self.num_blocks:
            return None
        self._untouched += 1
        return self._untouched - 1

    def _return(self, block: int) -> None:
        self._returned.add(block)
        if len(self._heap) > 2 * len(self._returned) + 64:
            self._heap = sorted(self._returned)
        else:
            heapq.heappush(self._heap, block)


def _nothing(_: int) -> None:
    return
