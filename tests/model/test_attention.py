"""Latent attention: both forms agree, with a cache of any history and without; a naive float64 loop is the oracle."""

import cmath
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.model.attention import AttentionGroup, AttentionInputs, LatentAttention
from fireflyer.model.cache import ContiguousCache
from fireflyer.model.rope import rope_amplitude, rope_cos_sin, rope_frequencies

KINDS = ["v2", "v2-lite", "v3", "moonlight", "k2"]
CLOSE = {"rtol": 0, "atol": 1e-5}


def norm(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def rotate(x, position, frequencies):
    """Pairs (x0, x1), (x2, x3), ... as complex numbers."""
    pairs = [complex(a, b) * cmath.exp(1j * position * w) for a, b, w in zip(x[::2], x[1::2], frequencies, strict=True)]
    return torch.tensor([part for pair in pairs for part in (pair.real, pair.imag)], dtype=torch.float64)


def naive_attention(layer: LatentAttention, x_TD, positions, frequencies, scale, config):
    """Report eq. 1-11, one head, query and key at a time, in float64."""
    weight = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    queries, latents, rope_keys = [], [], []
    for x, position in zip(x_TD.double(), positions, strict=True):
        if config.q_lora_rank is None:
            q = weight["q_proj.weight"] @ x
        else:
            q_latent = norm(weight["q_a_proj.weight"] @ x, weight["q_a_layernorm.weight"])
            q = weight["q_b_proj.weight"] @ q_latent
        kv = weight["kv_a_proj_with_mqa.weight"] @ x
        queries.append([(h[:nope], rotate(h[nope:].tolist(), position, frequencies)) for h in q.view(heads, -1)])
        latents.append(norm(kv[: config.kv_lora_rank], weight["kv_a_layernorm.weight"]))
        rope_keys.append(rotate(kv[config.kv_lora_rank :].tolist(), position, frequencies))
    up = weight["kv_b_proj.weight"].view(heads, nope + value, -1)
    rows = []
    for t, per_head in enumerate(queries):
        outputs = []
        for h, (q_nope, q_rope) in enumerate(per_head):
            scores = [scale * float(q_nope @ (up[h, :nope] @ latents[s]) + q_rope @ rope_keys[s]) for s in range(t + 1)]
            total = sum(math.exp(s - max(scores)) for s in scores)
            shares = [math.exp(s - max(scores)) / total for s in scores]
            outputs.append(sum(share * (up[h, nope:] @ latents[s]) for s, share in enumerate(shares)))
        rows.append(weight["o_proj.weight"] @ torch.cat(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize(("kind", "scale"), [("v2", 0.29418759), ("v2-lite", 0.29418759), ("v3", 0.32627118)])
def test_both_forms_equal_the_formulas(form, kind, scale, tiny):
    """The scales are 20^-½ · (0.1 · mscale · ln 8 + 1)², for mscale 0.707 and 1."""
    model = tiny(kind)
    layer = model.model.layers[0].self_attn
    x_BTD = torch.randn(1, 12, 48, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(12) + 30
    frequencies = rope_frequencies(model.config)
    cos, sin = rope_cos_sin(frequencies, positions[None], rope_amplitude(model.config.rope_scaling))
    inputs = AttentionInputs(cos, sin, (AttentionGroup(positions[None], None, None, 12, form),))
    with torch.no_grad():
        out = layer(x_BTD, inputs, 0)[0]
    expected = naive_attention(layer, x_BTD[0], positions.tolist(), frequencies.tolist(), scale, model.config)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_absorbed_equals_expanded(kind, tiny, ids):
    """In the logits, past YaRN's original length, and in every gradient."""
    gradients, logits = [], []
    for form in ("expanded", "absorbed"):
        model = tiny(kind)
        out = model(ids(2, 70), form=form).logits
        out.logsumexp(-1).mean().backward()
        logits.append(out.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-5)
    for name, expanded in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expanded, rtol=1e-3, atol=float(expanded.abs().max()) * 1e-4)


@given(
    kind=st.sampled_from(KINDS),
    cuts=st.sets(st.integers(1, 59), max_size=5),
    forms=st.lists(st.sampled_from(["expanded", "absorbed", None]), min_size=6, max_size=6),
)
def test_any_chunks_through_a_cache_equal_one_call(kind, cuts, forms, tiny, ids):
    model = tiny(kind)
    input_ids = ids(2, 60)
    bounds = [0, *sorted(cuts), 60]
    cache = ContiguousCache(model.config, 2, 64)
    parts = []
    with torch.no_grad():
        whole = model(input_ids).logits
        for start, end, form in zip(bounds, bounds[1:], forms, strict=False):
            parts.append(model(input_ids[:, start:end], cache=cache, form=form).logits)
            cache.advance(end - start)
    assert cache.lengths.tolist() == [60, 60]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=3e-5)


def test_token_by_token_equals_one_call(tiny, ids):
    model = tiny("v3")
    cache = ContiguousCache(model.config, 2, 50)
    with torch.no_grad():
        whole = model(ids(2, 50)).logits
        for t in range(50):
            step = model(ids(2, 50)[:, t : t + 1], cache=cache).logits
            cache.advance(1)
            torch.testing.assert_close(step[:, 0], whole[:, t], rtol=0, atol=3e-5)


def test_ragged_prompts_padded_on_the_right_equal_each_alone(tiny, ids):
    """Whatever the padding holds: it lies beyond every real query until a real token overwrites it."""
    model = tiny("v3")
    lengths, more = [17, 5, 30], 6
    sequences = [ids(1, n + more, seed=n)[0] for n in lengths]
    padded = ids(3, 30, seed=99)
    for row, (sequence, n) in enumerate(zip(sequences, lengths, strict=True)):
        padded[row, :n] = sequence[:n]
    cache = ContiguousCache(model.config, 3, 40)
    with torch.no_grad():
        alone = [model(sequence[None]).logits[0] for sequence in sequences]
        prefill = model(padded, cache=cache).logits
        cache.advance(torch.tensor(lengths))
        for row, n in enumerate(lengths):
            torch.testing.assert_close(prefill[row, :n], alone[row][:n], rtol=0, atol=3e-5)
        for step in range(more):
            tokens = torch.stack([sequence[n + step] for sequence, n in zip(sequences, lengths, strict=True)])
            logits = model(tokens[:, None], cache=cache).logits[:, 0]
            cache.advance(1)
            for row, n in enumerate(lengths):
                torch.testing.assert_close(logits[row], alone[row][n + step], rtol=0, atol=3e-5)


def test_the_cache_keeps_576_numbers_a_token_at_full_size():
    from fireflyer.config import load_config

    cache = ContiguousCache(load_config("deepseek-v3"), 1, 10, dtype=torch.bfloat16, device="meta")
    assert cache.slots.shape == (62, 1, 10, 576)  # 61 layers and one MTP module
    assert cache.max_length == 10


def test_the_cache_holds_the_normalised_latent_and_the_rotated_key(tiny, ids):
    """Filled at the positions given, and nowhere else."""
    model = tiny("v3")
    cache = ContiguousCache(model.config, 1, 40)
    with torch.no_grad():
        model(ids(1, 3), positions=torch.tensor([[5, 6, 31]]), cache=cache)
        first = model.model.layers[0]
        hidden = first.input_layernorm(model.model.embed_tokens(ids(1, 3)))[0].double()
    filled = cache.slots[0, 0].abs().sum(-1) > 0
    assert filled.nonzero().flatten().tolist() == [5, 6, 31]
    frequencies = rope_frequencies(model.config).tolist()
    kv = hidden @ first.self_attn.kv_a_proj_with_mqa.weight.detach().double().T
    for row, position in enumerate([5, 6, 31]):
        latent = norm(kv[row, :16], first.self_attn.kv_a_layernorm.weight.detach().double())
        key = rotate(kv[row, 16:].tolist(), position, frequencies)
        torch.testing.assert_close(cache.slots[0, 0, position].double(), torch.cat((latent, key)), **CLOSE)


def test_a_bf16_cache_serves_an_fp32_model(tiny, ids):
    model = tiny("v3", n_routed_experts=0)
    cache = ContiguousCache(model.config, 1, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        exact = model(ids(1, 40)).logits
        logits = model(ids(1, 40), cache=cache).logits
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).std() < 0.03 * exact.std()


def test_a_cache_keeps_no_graph(tiny, ids):
    model = tiny("v3")
    cache = ContiguousCache(model.config, 1, 8)
    assert model(ids(1, 8), cache=cache).logits.requires_grad
    assert not cache.slots.requires_grad


def test_a_position_beyond_the_cache_is_named(tiny, ids):
    model = tiny("v3")
    cache = ContiguousCache(model.config, 1, 8)
    with pytest.raises(ValueError, match="position 8 doesn't fit into a cache of max_length 8"):
        model(ids(1, 9), cache=cache)
    assert not cache.slots.any()


def test_short_calls_with_a_cache_run_absorbed_all_others_expanded(tiny, ids):
    """Told apart by their last bits."""
    model = tiny("v3")

    def run(tokens, form, cached):
        cache = ContiguousCache(model.config, 2, 16) if cached else None
        with torch.no_grad():
            return model(ids(2, tokens), form=form, cache=cache).logits

    for tokens, cached, form, other in (
        (8, True, "absorbed", "expanded"),
        (9, True, "expanded", "absorbed"),
        (8, False, "expanded", "absorbed"),
    ):
        assert torch.equal(run(tokens, None, cached), run(tokens, form, cached))
        assert not torch.equal(run(tokens, None, cached), run(tokens, other, cached))
