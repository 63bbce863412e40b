"""Which full blocks hold which tokens, so that a request may begin where another one has been.

A block is found by a chain of SHA-256 over all tokens up to its end, begun with the request's salt. A hash alone is
never believed: the tokens of the block and the identity of the block before it are compared too, so that a collision
costs a miss and not another user's latents.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from fireflyer.infer.block_pool import BlockPool


@dataclass(frozen=True, eq=False)
class CachedBlock:
    """A block whose tokens are known. Entries are compared by identity: a block filled anew is another entry."""

    block: int
    key: bytes
    parent: CachedBlock | None
    salt: str
    tokens: tuple[int, ...]


def chain_key(parent_key: bytes, salt: str, tokens: Sequence[int]) -> bytes:
    """SHA-256 over the key of the block before, or the salt for the first one, and this block's tokens."""
    digest = hashlib.sha256(parent_key or salt.encode("utf-8", "surrogatepass"))
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


class PrefixCache:
    """Full blocks by their tokens. Blocks that no request uses stay until the pool needs them for something else."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._by_key: dict[bytes, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        pool.on_reuse = self.forget

    def match(self, tokens: Sequence[int], salt: str, keys: list[bytes]) -> list[CachedBlock]:
        """The longest chain of blocks that hold the beginning of `tokens`; they are not taken yet.

        keys: those of the sequence's full blocks as far as they are known; what is missing is added.
        """
        chain: list[CachedBlock] = []
        parent: CachedBlock | None = None
        for place in range(len(tokens) // self._pool.block_size):
            found = self._by_key.get(self._key(tokens, salt, keys, place))
            if found is None or not self._stands_for(found, parent, salt, self._part(tokens, place)):
                break
            chain.append(found)
            parent = found
        return chain

    def register(
        self, block: int, chain: Sequence[CachedBlock], tokens: Sequence[int], salt: str, keys: list[bytes]
    ) -> CachedBlock | None:
        """Make a block findable that holds the tokens after those of `chain`.

        Returns the entry that stands for these tokens: the block's own, or that of an equal block that was there
        before; None where another chain has this key, or `chain` was forgotten: what follows can't be found either.
        """
        place, parent = len(chain), chain[-1] if chain else None
        if parent is not None and self._by_key.get(parent.key) is not parent:
            return None
        key, part = self._key(tokens, salt, keys, place), self._part(tokens, place)
        found = self._by_key.get(key)
        if found is None:
            found = CachedBlock(block, key, parent, salt, part)
            self._by_key[key] = self._by_block[block] = found
            self._pool.keep(block)
            return found
        return found if self._stands_for(found, parent, salt, part) else None

    def forget(self, block: int) -> None:
        """The block's tokens are not to be found any more; the pool knows, or asks for it."""
        entry = self._by_block.pop(block, None)
        if entry is not None:
            del self._by_key[entry.key]

    def discard(self, blocks: Sequence[int]) -> None:
        """Forget those of these blocks that can be found, and tell the pool."""
        for block in blocks:
            if block in self._by_block:
                self.forget(block)
                self._pool.discard(block)

    def clear(self) -> None:
        """Forget everything, as when the weights have changed."""
        self.discard(list(self._by_block))

    def _part(self, tokens: Sequence[int], place: int) -> tuple[int, ...]:
        size = self._pool.block_size
        return tuple(tokens[place * size : (place + 1) * size])

    def _key(self, tokens: Sequence[int], salt: str, keys: list[bytes], place: int) -> bytes:
        while len(keys) <= place:
            keys.append(chain_key(keys[-1] if keys else b"", salt, self._part(tokens, len(keys))))
        return keys[place]

    @staticmethod
    def _stands_for(entry: CachedBlock, parent: CachedBlock | None, salt: str, part: tuple[int, ...]) -> bool:
        return entry.tokens == part and entry.parent is parent and entry.salt == salt

    def check_integrity(self) -> None:
        """Raises AssertionError when the two indices or the pool disagree."""
        assert {entry.block for entry in self._by_key.values()} == set(self._by_block), (
            "prefix cache: two indices differ"
        )
        assert all(entry.block == block for block, entry in self._by_block.items()), "prefix cache: a block is misfiled"
        kept = self._pool.kept_blocks()
        assert kept == set(self._by_block), f"prefix cache: the pool keeps {kept ^ set(self._by_block)} otherwise"
