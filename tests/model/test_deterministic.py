"""Results that don't depend on company: the same bits alone and beside others, and the plain forms' values."""

import random

import pytest
import torch
import torch.nn.functional as F

from fireflyer.model.attention import AttentionGroup
from fireflyer.model.cache import ContiguousCache
from fireflyer.model.deterministic import attend_in_tiles, exact_sigmoid, exact_swiglu, routed_experts
from fireflyer.model.row_tiles import RowTiles

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def random_matrix(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "width"), [(16, 24), (17, 33), (64, 48), (256, 256), (1000, 40)])
def test_a_row_of_a_product_is_the_same_at_any_height_and_place(inner, width, dtype):
    tiles = RowTiles()
    weight = random_matrix(width, inner, dtype=dtype)
    x = random_matrix(700, inner, seed=1, dtype=dtype)
    row = x[:1]

    def product(rows):
        return tiles.linear(rows, weight)

    alone = product(row)
    torch.testing.assert_close(
        product(x), F.linear(x, weight), rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-3
    )
    for num_rows in [*range(1, 40), 63, 100, 511, 513, 700]:
        for place in {0, num_rows // 2, num_rows - 1}:
            among = x[:num_rows].clone()
            among[place] = row
            assert torch.equal(product(among)[place], alone[0]), (num_rows, place)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_batched_product_is_the_same_in_any_batch(dtype):
    tiles = RowTiles()
    kept = random_matrix(40, 16, 28, dtype=dtype)
    x = random_matrix(40, 70, 28, seed=1, dtype=dtype)
    scores = tiles.bmm(x[:1, :1], kept[:1].transpose(1, 2))[0, 0]
    for batch, num_rows in [(1, 2), (1, 16), (2, 1), (3, 7), (40, 1), (40, 33), (9, 70)]:
        x[batch - 1, num_rows - 1], kept[batch - 1] = x[0, 0], kept[0]
        result = tiles.bmm(x[:batch, :num_rows], kept[:batch].transpose(1, 2))
        assert torch.equal(result[-1, -1], scores), (batch, num_rows)


def test_activations_are_torchs_and_know_nothing_of_the_array_around():
    x = random_matrix(3000) * 4
    torch.testing.assert_close(exact_sigmoid(x), x.sigmoid())
    gate_up = x.view(-1, 20)
    torch.testing.assert_close(exact_swiglu(gate_up), F.silu(gate_up[:, :10]) * gate_up[:, 10:])
    for size in range(1, 70):
        assert torch.equal(exact_sigmoid(x[:size]), exact_sigmoid(x)[:size])
        assert torch.equal(exact_swiglu(gate_up[:size]), exact_swiglu(gate_up)[:size])


def test_activations_are_the_same_where_threads_share_an_array():
    gate_up = random_matrix(257, 2000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together, alone = exact_swiglu(gate_up), torch.cat([exact_swiglu(row[None]) for row in gate_up])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_in_tiles_is_softmax_attention(dtype):
    """Against fp64 over all slots at once; tiles that don't fit the length, several blocks of queries, large scores."""
    latent, scale = 16, 0.7
    kept = random_matrix(2, 83, 24, dtype=dtype)
    q = random_matrix(2, 40, 3, 24, seed=1, dtype=dtype)
    last = torch.stack((torch.arange(40), torch.arange(43, 83)))
    scores = torch.einsum("bthc,bsc->bths", q.double(), kept.double()) * scale
    hidden = torch.arange(83) > last[..., None]
    weights = scores.masked_fill(hidden[:, :, None], -torch.inf).softmax(-1)
    expected = torch.einsum("bths,bsl->bthl", weights, kept[..., :latent].double())
    for kv_tile in (8, 16, 128):
        found = attend_in_tiles(q, kept, last, latent, scale, RowTiles(kv_tile))
        tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-6
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_routed_experts_are_the_loop_over_tokens():
    x, gate_up, down = random_matrix(9, 12), random_matrix(5, 16, 12, seed=1), random_matrix(5, 12, 8, seed=2)
    indices = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(n))[:3] for n in range(9)])
    weights = random_matrix(9, 3, seed=3).abs()
    expected = torch.zeros(9, 12)
    for n in range(9):
        for k in range(3):
            gate, up = (gate_up[indices[n, k]] @ x[n]).chunk(2)
            expected[n] += weights[n, k] * (down[indices[n, k]] @ (F.silu(gate) * up))
    found = routed_experts(x, indices, weights, gate_up, down, RowTiles())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for n in range(9):
        alone = routed_experts(x[n : n + 1], indices[n : n + 1], weights[n : n + 1], gate_up, down, RowTiles())
        assert torch.equal(alone[0], found[n])


def logits_in_chunks(model, tiles, sequences, row, chunks, cache_dtype):
    """(T, V) logits of sequence `row`, read beside the others chunk by chunk."""
    cache = ContiguousCache(model.config, len(sequences), sequences.shape[1], cache_dtype)
    parts, start = [], 0
    for chunk in chunks:
        hidden = model.trunk(sequences[:, start : start + chunk], cache=cache, tiles=tiles).hidden_BTD
        cache.advance(chunk)
        start += chunk
        parts.append(model.head(hidden, tiles)[row])
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("kind", "dtype", "cache_dtype"),
    [
        ("v3", torch.float32, torch.float32),
        ("v3", torch.bfloat16, torch.bfloat16),
        ("v2-lite", torch.float32, torch.bfloat16),
        ("v2", torch.bfloat16, torch.float32),
    ],
)
def test_logits_are_the_same_in_any_batch_and_any_chunks(kind, dtype, cache_dtype, tiny, ids):
    model, length = tiny(kind).to(dtype), 60
    tiles = RowTiles(kv_tile=16)
    sequence = ids(1, length)
    whole = logits_in_chunks(model, tiles, sequence, 0, [length], cache_dtype)
    draw = random.Random(0)
    for trial in range(6):
        batch, most = draw.choice([1, 2, 3, 8]), draw.choice([1, 4, 17, 60])
        chunks = []
        while sum(chunks) < length:
            chunks.append(min(draw.randint(1, most), length - sum(chunks)))
        row = draw.randrange(batch)
        sequences = ids(batch, length, seed=trial + 2)
        sequences[row] = sequence
        found = logits_in_chunks(model, tiles, sequences, row, chunks, cache_dtype)
        assert torch.equal(found, whole), (batch, chunks)


@pytest.mark.parametrize("kind", ["v3", "v2"])
def test_logits_are_the_plain_ones_up_to_rounding(kind, tiny, ids):
    model = tiny(kind)
    plain = model(ids(2, 50)).logits
    tiles = RowTiles(kv_tile=16)
    found = model.head(model.trunk(ids(2, 50), tiles=tiles).hidden_BTD, tiles)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-4)


@pytest.mark.parametrize("parts", [[(19, 20), (10, 13), (5, 24)], [(19, 20), (7, 8)]], ids=["chunk", "decode"])
def test_rows_of_groups_and_mtp_are_those_of_the_sequence_alone(parts, tiny, ids):
    """An engine's call: a decoding row, a row with two drafts and a chunk beside each other, then the MTP layer."""
    model = tiny("v3", num_nextn_predict_layers=1)
    tiles = RowTiles(kv_tile=8)
    sequences = [ids(1, 30, seed=n) for n in range(len(parts))]
    alone, groups, rows, positions = [], [], [], []
    for sequence, (start, stop) in zip(sequences, parts, strict=True):
        cache = ContiguousCache(model.config, 1, 30)
        read = at(0, 25)
        one = AttentionGroup(read, None, cache, 25, "absorbed")
        main = model.trunk(sequence[:, :25], positions=read, groups=[one], tiles=tiles).hidden_BTD
        mtp = model.mtp_step(0, main, sequence[:, 1:26], read, [one], tiles)
        alone.append((main[0, start:stop], mtp[0, start:stop]))
        cache = ContiguousCache(model.config, 1, 30)
        read = at(0, start)
        one = AttentionGroup(read, None, cache, start, "absorbed")
        main = model.trunk(sequence[:, :start], positions=read, groups=[one], tiles=tiles).hidden_BTD
        model.mtp_step(0, main, sequence[:, 1 : start + 1], read, [one], tiles)
        positions.append(at(start, stop))
        groups.append(AttentionGroup(positions[-1], None, cache, stop, "expanded"))
        rows.append((sequence[:, start:stop], sequence[:, start + 1 : stop + 1]))
    tokens, next_tokens = (torch.cat(part, 1) for part in zip(*rows, strict=True))
    main = model.trunk(tokens, positions=torch.cat(positions, 1), groups=groups, tiles=tiles).hidden_BTD
    mtp = model.mtp_step(0, main, next_tokens, torch.cat(positions, 1), groups, tiles)
    assert torch.equal(main[0], torch.cat([part[0] for part in alone]))
    assert torch.equal(mtp[0], torch.cat([part[1] for part in alone]))


def at(start, stop):
    return torch.arange(start, stop)[None]


def test_documents_are_refused(tiny, ids):
    with pytest.raises(ValueError, match="document_ids"):
        tiny("v3").trunk(ids(1, 4), document_ids=torch.zeros(1, 4), tiles=RowTiles())
