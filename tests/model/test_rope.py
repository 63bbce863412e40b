"""Rotary positions and YaRN: published figures, a float64 loop and complex numbers are the oracles."""

import cmath
import itertools
import math

import pytest
import torch

from fireflyer.config import RopeScaling, load_config
from fireflyer.model.rope import (
    apply_rope,
    pair_factors,
    rope_amplitude,
    rope_cos_sin,
    rope_frequencies,
    softmax_scale,
    turn_pairs,
    yarn_correction_range,
    yarn_mscale,
)

PRESETS = ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "moonlight", "kimi-k2"]


@pytest.mark.parametrize(
    ("factor", "mscale", "expected"),
    [(40, 1.0, 1.3688879), (40, 0.707, 1.2608038), (32, 1.0, 1.3465736), (1, 1.0, 1.0), (0.5, 1.0, 1.0)],
)
def test_temperature(factor, mscale, expected):
    assert yarn_mscale(factor, mscale) == pytest.approx(expected, abs=5e-8)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("deepseek-v3", 0.1352338),
        ("deepseek-v2", 0.1147214),
        ("deepseek-v2-lite", 0.1147214),
        ("kimi-k2", 192**-0.5 * 1.3465736**2),
        ("moonlight", 192**-0.5),
    ],
)
def test_softmax_scale_of_the_released_models(preset, expected):
    config = load_config(preset)
    assert softmax_scale(config) == pytest.approx(expected, abs=5e-8)
    assert rope_amplitude(config.rope_scaling) == 1.0


@pytest.mark.parametrize("mscale", [0.5, 0.707, 1.0, 2.0])
@pytest.mark.parametrize("mscale_all_dim", [0.5, 0.707, 1.0, 2.0])
def test_the_two_corrections_are_separate(mscale, mscale_all_dim):
    """The scale knows mscale_all_dim alone, the amplitude is the quotient."""
    ln40 = 3.6888794541139363
    scaling = RopeScaling(
        factor=40.0, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale_all_dim
    )
    config = load_config("deepseek-v3").model_copy(update={"rope_scaling": scaling})
    assert softmax_scale(config) == pytest.approx(192**-0.5 * (0.1 * mscale_all_dim * ln40 + 1) ** 2)
    expected = (0.1 * mscale * ln40 + 1) / (0.1 * mscale_all_dim * ln40 + 1)
    assert rope_amplitude(scaling) == pytest.approx(expected)


def test_without_mscale_all_dim_the_amplitude_carries_the_temperature():
    scaling = RopeScaling(factor=40.0, original_max_position_embeddings=4096)
    config = load_config("deepseek-v3").model_copy(update={"rope_scaling": scaling})
    assert softmax_scale(config) == pytest.approx(192**-0.5)
    assert rope_amplitude(scaling) == pytest.approx(1.3688879)
    assert rope_amplitude(None) == 1.0


@pytest.mark.parametrize(("preset", "expected"), [("deepseek-v3", (10, 23)), ("kimi-k2", (19, 20))])
def test_correction_range_of_the_released_models(preset, expected):
    config = load_config(preset)
    assert config.rope_scaling is not None
    assert yarn_correction_range(config.rope_scaling, 64, config.rope_theta) == expected


def naive_frequencies(config):
    """One pair at a time, in float64: turning fast stays, turning slowly is interpolated, between them a line."""
    width, scaling = config.qk_rope_head_dim, config.rope_scaling
    plain = [config.rope_theta ** (-2 * i / width) for i in range(width // 2)]
    if scaling is None:
        return plain

    def pair_that_turns(times):
        return width / 2 * math.log(scaling.original_max_position_embeddings / (2 * math.pi * times), config.rope_theta)

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), width - 1)
    if first == last:
        last += 0.001
    result = []
    for i, frequency in enumerate(plain):
        interpolated = min(max((i - first) / (last - first), 0), 1)
        result.append(interpolated * frequency / scaling.factor + (1 - interpolated) * frequency)
    return result


@pytest.mark.parametrize("preset", PRESETS)
def test_frequencies_of_the_released_models(preset):
    config = load_config(preset)
    frequencies = rope_frequencies(config)
    assert frequencies.dtype == torch.float32
    expected = torch.tensor(naive_frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(frequencies.double(), expected, rtol=3e-7, atol=0)
    if config.rope_scaling is not None:
        assert frequencies[0] == 1
        assert float(frequencies[-1]) * config.rope_scaling.factor == pytest.approx(config.rope_theta ** (-62 / 64))


@pytest.mark.parametrize(("betas", "width"), [((32, 1), 8), ((1, 1), 8), ((1e6, 1e5), 8), ((1e-3, 1e-4), 16)])
def test_frequencies_where_the_range_is_cut_or_a_point(betas, width):
    scaling = RopeScaling(
        factor=4.0, original_max_position_embeddings=64, beta_fast=float(betas[0]), beta_slow=float(betas[1])
    )
    config = load_config("deepseek-v3").model_copy(update={"rope_scaling": scaling, "qk_rope_head_dim": width})
    expected = torch.tensor(naive_frequencies(config), dtype=torch.float64)
    torch.testing.assert_close(rope_frequencies(config).double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_frequencies_equal_the_published_codes_bit_for_bit(preset):
    """The released inference code's lines; at position 160,000 one rounding of a frequency is an angle of 0.01."""
    config = load_config(preset)
    freqs = 1.0 / (config.rope_theta ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))
    if config.rope_scaling is not None:
        low, high = yarn_correction_range(config.rope_scaling, 64, config.rope_theta)
        ramp = torch.clamp((torch.arange(32, dtype=torch.float32) - low) / (high - low), 0, 1)
        smooth = 1 - ramp
        freqs = freqs / config.rope_scaling.factor * (1 - smooth) + freqs * smooth
    assert torch.equal(rope_frequencies(config), freqs)


@pytest.mark.parametrize("preset", ["deepseek-v3", "moonlight"])
def test_angles_equal_transformers(preset):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    config = load_config(preset)
    theirs = DeepseekV3RotaryEmbedding(DeepseekV3Config(**config.to_dict()))
    positions = torch.tensor([[0, 1, 4096, 163839]])
    cos, sin = theirs(torch.zeros(1), positions)
    ours = rope_cos_sin(rope_frequencies(config), positions, rope_amplitude(config.rope_scaling))
    torch.testing.assert_close(ours[0], cos[..., :32], rtol=0, atol=0.02)
    torch.testing.assert_close(ours[1], sin[..., :32], rtol=0, atol=0.02)
    torch.testing.assert_close(ours[1][:, :2], sin[:, :2, :32], rtol=0, atol=1e-6)


def test_interleaved_pairs_turn_as_complex_numbers():
    """Position by position, not from 0 on, for a query (heads) and a key (none); the amplitude multiplies."""
    frequencies = [1.0, 0.3, 0.01]
    positions = torch.tensor([[7, 8, 100], [0, 3, 2]])
    cos, sin = rope_cos_sin(torch.tensor(frequencies), positions, 1.5)
    x_BTHR = torch.randn(2, 3, 2, 6, generator=torch.Generator().manual_seed(0))
    rotated = apply_rope(x_BTHR, cos[:, :, None], sin[:, :, None])
    key = apply_rope(x_BTHR[:, :, 1], cos, sin)
    assert torch.equal(key, rotated[:, :, 1])
    for b, t, h, pair in itertools.product(range(2), range(3), range(2), range(3)):
        before = complex(*x_BTHR[b, t, h, 2 * pair : 2 * pair + 2].tolist())
        after = complex(*rotated[b, t, h, 2 * pair : 2 * pair + 2].tolist())
        assert after == pytest.approx(1.5 * before * cmath.exp(1j * int(positions[b, t]) * frequencies[pair]), abs=1e-5)


def test_rotation_keeps_the_dtype_and_computes_in_fp32():
    cos, sin = rope_cos_sin(torch.tensor([0.001]), torch.tensor([[1]]), 1.0)
    x = torch.tensor([[[1.0, 3.0]]], dtype=torch.bfloat16)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), cos, sin).bfloat16())


def test_only_differences_of_positions_matter(tiny, ids):
    model = tiny("v3")
    positions = torch.arange(40).expand(2, 40)
    with torch.no_grad():
        here = model(ids(2, 40), positions=positions).logits
        there = model(ids(2, 40), positions=positions + 100).logits
        stretched = model(ids(2, 40), positions=2 * positions).logits
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)
    assert (stretched - here).abs().max() > 0.1


@pytest.mark.parametrize("start", [2, 3])
def test_training_rotates_as_decoding_does(start):
    """With gradients by complex products, wherever the slice begins; without them by real ones."""
    wide = torch.randn(2, 5, start + 8, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(4.0).expand(2, 5, 4)
    decoded = apply_rope(wide[..., start:], angles.cos(), angles.sin())
    trained = apply_rope(wide.requires_grad_()[..., start:], angles.cos(), angles.sin())
    torch.testing.assert_close(trained, decoded, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(trained, wide, grad_outputs=decoded)
    # Rotating back what was rotated gives the vector itself.
    torch.testing.assert_close(gradient[..., start:], wide.detach()[..., start:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_by_shared_factors_is_the_same_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(2, 5, 8, generator=generator) * 1000
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(2, 5, 3, 40, generator=generator).to(dtype)[..., 24:]  # a part of a wider row, as queries are
    own, neighbour, place = pair_factors(cos, sin)
    turned = turn_pairs(x, own[:, :, None], neighbour[:, :, None], place)
    assert torch.equal(turned, apply_rope(x, cos[:, :, None], sin[:, :, None]))
    assert turned.dtype == dtype
    assert torch.equal(turn_pairs(x[:, :, 0], own, neighbour, place), turned[:, :, 0])
