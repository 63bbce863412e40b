"""The cache against a dictionary of slots; blocks side by side or scattered; what int8 may cost."""

import random

import pytest
import torch

from fireflyer.infer.paged_cache import PagedCache, cache_torch_dtype, dequantise, free_bytes, quantise, slot_bytes

WIDTH, LATENT, SIZE = 12, 8, 4


def make(dtype=torch.float32, read_dtype=torch.float32, num_blocks=20):
    return PagedCache(2, num_blocks, SIZE, WIDTH, LATENT, dtype, read_dtype, torch.device("cpu"))


def latents(*shape, seed=0):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scattered", [False, True])
def test_sequences_read_what_they_wrote(scattered):
    """Three of unequal length grow side by side, in pieces; layers don't meet."""
    draw = random.Random(1)
    numbers = list(range(1, 20))
    if scattered:
        draw.shuffle(numbers)
    tables = [[numbers.pop(0) for _ in range(count)] for count in (5, 2, 4)]
    lengths = [17, 6, 12]
    cache, written = make(), {}
    for layer in (0, 1):
        for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            start = 0
            while start < length:
                stop = min(start + draw.randrange(1, 6), length)
                slots = [table[p // SIZE] * SIZE + p % SIZE for p in range(start, stop)]
                new = latents(1, stop - start, seed=layer * 1000 + row * 100 + start)
                written.update({(layer, row, start + i): new[0, i] for i in range(stop - start)})
                view = cache.view([table[: -(-stop // SIZE)]], slots)
                kept = view.extend(layer, new, torch.arange(start, stop)[None], stop)
                assert kept.shape == (1, stop, WIDTH)
                assert torch.equal(kept[0], torch.stack([written[layer, row, p] for p in range(stop)]))
                start = stop
    # All three in one call, the next token of each: shorter ones are padded with zeros.
    next_slots = [table[length // SIZE] * SIZE + length % SIZE for table, length in zip(tables, lengths, strict=True)]
    new = latents(3, 1, seed=7)
    kept = cache.view(tables, next_slots[:1] + next_slots[1:]).extend(1, new, torch.tensor([[17], [6], [12]]), 18)
    for row, length in enumerate(lengths):
        assert torch.equal(kept[row, :length], torch.stack([written[1, row, p] for p in range(length)]))
        assert torch.equal(kept[row, length], new[row, 0])
        assert not kept[row, len(tables[row]) * SIZE :].any()


def test_a_lone_sequence_side_by_side_is_read_in_place():
    cache = make()
    view = cache.view([[3, 4, 5]], [3 * SIZE])
    kept = view.extend(0, latents(1, 1), torch.tensor([[0]]), 9)
    assert kept.data_ptr() == cache.slots[0, 3].data_ptr()
    scattered = cache.view([[3, 5, 4]], [3 * SIZE]).extend(0, latents(1, 1), torch.tensor([[0]]), 9)
    assert scattered.data_ptr() != cache.slots[0, 3].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_smaller_numbers_are_close(dtype):
    """Against the rounding that the format promises: 2^-9 relative, or half of the token's own scale."""
    cache, new = make(dtype), latents(1, 9)
    new[..., LATENT:] *= 50  # rope keys of another size cost the latent nothing
    slots = [SIZE + p for p in range(9)]
    kept = cache.view([[1, 2, 3]], slots).extend(0, new, torch.arange(9)[None], 9)
    assert kept.dtype == torch.float32
    for part in (slice(None, LATENT), slice(LATENT, None)):
        wrong = (kept[..., part] - new[..., part]).abs()
        if dtype == torch.bfloat16:
            assert (wrong <= new[..., part].abs() * 2**-8).all()
        else:
            assert (wrong <= new[..., part].abs().amax(-1, keepdim=True) / 254 * 1.001).all()
            assert wrong.max() > 0


def test_int8_keeps_zeros_extremes_and_shapes():
    numbers = torch.zeros(3, WIDTH)
    numbers[1, 0], numbers[1, LATENT] = 1e-30, -1e30
    numbers[2, :LATENT] = -3.0
    eight, scales = quantise(numbers, LATENT)
    assert eight.dtype == torch.int8
    assert scales.shape == (3, 2)
    back = dequantise(eight, scales, LATENT, torch.float32)
    torch.testing.assert_close(back, numbers, rtol=1e-6, atol=0)
    grid = dequantise(eight.view(1, 3, 1, WIDTH), scales.view(1, 3, 1, 2), LATENT, torch.bfloat16)
    assert grid.shape == (1, 3, 1, WIDTH)
    assert grid.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_wiping_takes_nan_out_of_every_layer(dtype):
    cache = make(dtype)
    bad = torch.full((1, 4, WIDTH), torch.nan)
    for layer in (0, 1):
        for block in (2, 3):
            slots = [block * SIZE + p for p in range(4)]
            cache.view([[block]], slots).extend(layer, bad, torch.arange(4)[None], 4)
    cache.wipe([2])
    for layer in (0, 1):
        assert not cache.read(layer, slice(2, 3), 1).any()
        assert cache.read(layer, slice(3, 4), 1).isnan().any() or dtype == torch.int8


def test_memory_is_taken_where_it_is_written():
    """A cache of 2 GB opens at once."""
    cache = PagedCache(60, 5_500, 16, 96, 64, torch.float32, torch.float32, torch.device("cpu"))
    kept = cache.view([[5_499]], [5_499 * 16]).extend(59, torch.ones(1, 1, 96), torch.zeros(1, 1), 1)
    assert float(kept.sum()) == 96
    assert not cache.slots[59, 0].any()


def test_sizes():
    assert slot_bytes(61, 576, torch.bfloat16) == 70_272  # V3's published figure
    assert slot_bytes(1, 576, torch.int8) == 584
    assert cache_torch_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert cache_torch_dtype("int8", torch.float32) == torch.int8
    assert 0 < free_bytes(torch.device("cpu")) < 2**50
