"""The pool against a plain model of it, under random use; order of eviction; what the integrity check catches."""

import random

import pytest

from fireflyer.infer.block_pool import NULL_BLOCK, BlockPool


def test_random_use_loses_and_doubles_nothing():
    """Thousands of operations; a list of holders' blocks and a set of findable ones is all that the model keeps."""
    draw = random.Random(0)
    for num_blocks in (2, 9, 40):
        pool = BlockPool(num_blocks, 4)
        held: list[list[int]] = []
        kept: set[int] = set()
        pool.on_reuse = kept.remove
        for _ in range(1500):
            used = {block for blocks in held for block in blocks}
            kind = draw.randrange(5)
            if kind == 0:
                count = draw.randrange(1, 5)
                blocks = pool.allocate(count, draw.choice([None, draw.randrange(num_blocks)]))
                if blocks is None:
                    assert count > num_blocks - 1 - len(used)
                else:
                    assert len(set(blocks)) == count
                    assert not set(blocks) & (used | {NULL_BLOCK})
                    assert not set(blocks) & kept  # on_reuse has told of those that were findable
                    held.append(blocks)
            elif kind == 1 and (found := sorted(kept)):
                shared = draw.sample(found, draw.randrange(1, len(found) + 1))
                pool.share(shared)
                held.append(shared)
            elif kind == 2 and held:
                pool.release(held.pop(draw.randrange(len(held))))
            elif kind == 3 and held:
                block = draw.choice(draw.choice(held))
                if block not in kept:
                    pool.keep(block)
                    kept.add(block)
            elif kind == 4 and kept and draw.random() < 0.2:
                block = draw.choice(sorted(kept))
                pool.discard(block)
                kept.remove(block)
            pool.check_integrity(held)
            assert pool.kept_blocks() == kept
            assert pool.num_used == len({block for blocks in held for block in blocks})
            assert pool.num_free == num_blocks - 1 - pool.num_used


def test_neighbours_are_preferred():
    pool = BlockPool(20, 4)
    first = pool.allocate(3)
    assert first == [1, 2, 3]
    second = pool.allocate(2)
    assert second == [4, 5]
    pool.release(second)
    assert pool.allocate(1, after=3) == [4]
    assert pool.allocate(1, after=19) == [5]  # the smallest, where the neighbour is taken or none
    assert pool.allocate(2, after=4) == [6, 7]


def test_empty_blocks_go_first_then_the_longest_idle_and_of_a_sequence_its_end():
    pool = BlockPool(6, 4)
    forgotten: list[int] = []
    pool.on_reuse = forgotten.append
    early, late = pool.allocate(2), pool.allocate(2)
    assert (early, late) == ([1, 2], [3, 4])
    for block in (1, 2, 3, 4):
        pool.keep(block)
    pool.release(early)
    pool.release(late)
    assert pool.allocate(1) == [5]
    assert forgotten == []
    pool.share([1])  # used again: young
    pool.release([1])
    assert pool.allocate(4) == [2, 4, 3, 1]
    assert forgotten == [2, 4, 3, 1]
    assert pool.allocate(1) is None


def test_releasing_twice_is_noticed():
    pool = BlockPool(4, 4)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(KeyError):
        pool.release(blocks)


def test_the_integrity_check_sees_leaks_strangers_and_doubles():
    def used_pool():
        pool = BlockPool(8, 4)
        blocks = pool.allocate(3)
        assert blocks is not None
        pool.keep(blocks[0])
        pool.check_integrity([blocks])
        return pool, blocks

    pool, blocks = used_pool()
    with pytest.raises(AssertionError, match="other users"):
        pool.check_integrity([])  # its holder is gone, the blocks are not free: a leak
    with pytest.raises(AssertionError, match="other users"):
        pool.check_integrity([blocks, blocks[:1]])
    pool, blocks = used_pool()
    pool._returned.add(blocks[1])
    with pytest.raises(AssertionError, match="two states"):
        pool.check_integrity([blocks])
    pool, blocks = used_pool()
    pool.release(blocks[1:])
    pool._returned.clear()
    with pytest.raises(AssertionError, match="lost"):
        pool.check_integrity([blocks[:1]])
    pool, blocks = used_pool()
    pool.release(blocks)
    pool._kept.clear()
    with pytest.raises(AssertionError, match="can't be found"):
        pool.check_integrity([])
