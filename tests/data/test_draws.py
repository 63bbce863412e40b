"""Random choices are part of the format: a resumed run must make those it would have made."""

import hashlib

import numpy as np

from fireflyer.data.draws import fraction, permutation, words


def test_words_are_a_hash_of_the_key() -> None:
    digest = hashlib.blake2b(b"7/order/0/2", digest_size=64).digest()
    assert words(7, "order", 0, 2) == np.frombuffer(digest, dtype="<u8").tolist()
    assert words(1, 23) != words(12, 3)


def test_fractions_lie_in_the_unit_interval() -> None:
    assert fraction(0) == 0
    assert 0.999 < fraction(2**64 - 1) < 1
    assert fraction(2**63) == 0.5


def test_an_order_stays_what_it_was_when_first_released() -> None:
    assert permutation(10, 0, "order", 0, 0).tolist() == [9, 5, 3, 1, 0, 4, 6, 7, 2, 8]
    assert permutation(10, 0, "order", 0, 1).tolist() == [8, 2, 3, 6, 1, 0, 4, 9, 7, 5]


def test_orders_are_uniform() -> None:
    firsts = [int(permutation(4, seed)[0]) for seed in range(4000)]
    assert all(abs(firsts.count(value) - 1000) < 4 * (4000 * 3 / 16) ** 0.5 for value in range(4))
    assert len({tuple(permutation(4, seed)) for seed in range(500)}) == 24
