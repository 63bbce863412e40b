"""What is found and what must not be: other salts, other tokens, collisions, blocks that were given away."""

import pytest

from fireflyer.infer import prefix_cache
from fireflyer.infer.block_pool import BlockPool
from fireflyer.infer.prefix_cache import PrefixCache


def fill(cache, pool, tokens, salt=""):
    """Compute `tokens` as a request does that finds nothing: its blocks and the entries that stand for them."""
    blocks = pool.allocate(len(tokens) // pool.block_size)
    chain = []
    for block in blocks:
        entry = cache.register(block, chain, tokens, salt, [])
        if entry is None:
            break
        chain.append(entry)
    return blocks, chain


@pytest.fixture
def pool():
    return BlockPool(20, 4)


@pytest.fixture
def cache(pool):
    return PrefixCache(pool)


def found(cache, tokens, salt=""):
    return [entry.block for entry in cache.match(tokens, salt, [])]


def test_the_longest_common_beginning_in_whole_blocks(cache, pool):
    tokens = list(range(100, 112))
    blocks, _ = fill(cache, pool, tokens)
    assert found(cache, tokens) == blocks
    assert found(cache, [*tokens, 5, 6, 7, 8, 9]) == blocks
    assert found(cache, tokens[:11]) == blocks[:2]
    assert found(cache, [*tokens[:9], 0, *tokens[10:]]) == blocks[:2]
    assert found(cache, [0, *tokens[1:]]) == []
    # The same block elsewhere is another block: its latents depend on all before it.
    assert found(cache, tokens[4:]) == []


def test_salts_are_apart(cache, pool):
    tokens = list(range(8))
    blocks, _ = fill(cache, pool, tokens, "alice")
    assert found(cache, tokens, "alice") == blocks
    assert found(cache, tokens, "bob") == []
    assert found(cache, tokens) == []
    others, _ = fill(cache, pool, tokens, "bob")
    assert found(cache, tokens, "bob") == others
    assert found(cache, tokens, "alice") == blocks


@pytest.mark.parametrize(("mine", "yours"), [((1, 2, 3, 4), (5, 6, 7, 8)), ((1, 2, 3, 4), (1, 2, 3, 4))])
def test_a_collision_is_a_miss(cache, pool, monkeypatch, mine, yours):
    """Every block hashes alike: tokens, what came before, and the salt still tell them apart."""
    monkeypatch.setattr(prefix_cache, "chain_key", lambda parent_key, salt, tokens: b"same")
    salt = "a" if mine == yours else ""
    blocks, chain = fill(cache, pool, list(mine))
    assert found(cache, list(mine)) == blocks
    assert found(cache, list(yours), salt) == []
    assert fill(cache, pool, list(yours), salt)[1] == []
    # The second block of a sequence has the first one's key: not found as its own successor either.
    assert found(cache, [*mine, *mine]) == blocks
    assert cache.register(9, chain, [*mine, *mine], "", []) is None


def test_the_key_tells_salt_history_and_order():
    keys = {
        prefix_cache.chain_key(b"", "", (1, 2)),
        prefix_cache.chain_key(b"", "", (2, 1)),
        prefix_cache.chain_key(b"", "s", (1, 2)),
        prefix_cache.chain_key(prefix_cache.chain_key(b"", "", (1, 2)), "", (1, 2)),
        prefix_cache.chain_key(b"", "", (1, 2, 1, 2)),
        prefix_cache.chain_key(b"", "\udcff", (1, 2)),  # a salt from anywhere
    }
    assert len(keys) == 6


def test_a_second_copy_is_not_kept_and_its_successors_are_found(cache, pool):
    """Two requests computed the same beginning side by side; the second goes on."""
    blocks, _ = fill(cache, pool, list(range(4)))
    twin, chain = fill(cache, pool, [*range(4), 9, 9, 9, 9])
    assert found(cache, [*range(4), 9, 9, 9, 9]) == [blocks[0], twin[1]]
    assert [entry.block for entry in chain] == [blocks[0], twin[1]]
    pool.release(twin)
    assert pool.num_idle == 1  # the copy is empty again


def test_a_block_that_is_filled_anew_is_found_no_longer(cache, pool):
    tokens = list(range(12))
    blocks, chain = fill(cache, pool, tokens)
    pool.release(blocks)
    assert found(cache, tokens) == blocks
    pool.allocate(16)
    pool.allocate(1)  # takes the end of the sequence
    assert found(cache, tokens) == blocks[:2]
    cache.check_integrity()
    pool.allocate(2)
    assert found(cache, tokens) == []
    # A request that still holds the old entries can't hang new blocks on them.
    assert cache.register(19, chain, [*tokens, 1, 2, 3, 4], "", []) is None
    cache.check_integrity()


def test_a_successor_of_a_block_that_came_back_is_not_taken_for_its_own(cache, pool):
    tokens = list(range(8))
    blocks, chain = fill(cache, pool, tokens)
    cache.discard(blocks[:1])
    again, _ = fill(cache, pool, tokens[:4])
    # Equal tokens, but another entry than the one that the second block was computed after.
    assert found(cache, tokens) == again
    assert chain[1].parent is chain[0]


def test_clear_forgets_used_and_idle_blocks(cache, pool):
    kept, _ = fill(cache, pool, list(range(8)))
    idle, _ = fill(cache, pool, list(range(50, 58)))
    pool.release(idle)
    cache.clear()
    assert found(cache, list(range(8))) == found(cache, list(range(50, 58))) == []
    cache.check_integrity()
    pool.check_integrity([kept])
    assert pool.num_idle == 0


def test_keys_are_computed_once(cache, monkeypatch):
    calls = []
    real = prefix_cache.chain_key
    monkeypatch.setattr(prefix_cache, "chain_key", lambda *args: calls.append(1) or real(*args))
    keys: list[bytes] = []
    pool_tokens = list(range(40))
    cache.match(pool_tokens, "", keys)
    cache.match(pool_tokens, "", keys)
    assert len(calls) == len(keys) == 1  # nothing is there: the first block already misses
