"""The published names against a naive listing and against the figures of the released files' own listings."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from published_models import FAMILIES, WIDTHS, naive_listing

import fireflyer
from fireflyer.checkpoint.names import published_names, published_places, scale_name
from fireflyer.config import ModelConfig, load_config
from fireflyer.numerics.fp8 import scale_shape

PRESETS = Path(fireflyer.__file__).parent / "presets"
VARIANTS = {
    "plain": {},
    "two MTP depths": {"num_nextn_predict_layers": 2},
    "tied": {"num_nextn_predict_layers": 1, "tie_word_embeddings": True},
    "all dense": {"first_k_dense_replace": 3},
    "no shared expert": {"n_shared_experts": 0},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_the_listing(family: str, variant: str) -> None:
    settings = {**WIDTHS, **FAMILIES[family], **VARIANTS[variant]}
    model_type = "deepseek_v2" if family.startswith("v2") else "deepseek_v3"
    config = ModelConfig.from_dict({"model_type": model_type, "routed_scaling_factor": 1.0, **settings})
    shapes = {place.name: list(place.shape) for place in published_places(config)}
    assert shapes == naive_listing(settings)
    assert published_names(config) == sorted(shapes)


def test_v3_as_released() -> None:
    """91,991 tensors: F8 680,571,043,840 + BF16 3,918,786,560 + F32 41,555,600 numbers in 688,574,839,360 bytes."""
    config = load_config("deepseek-v3")
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    config = config.replace(num_nextn_predict_layers=1, quantization_config=block)
    names = published_names(config)
    assert len(names) == 91_991
    places = list(published_places(config))
    expected = naive_listing(json.loads((PRESETS / "deepseek-v3.json").read_text()))
    assert set(names) == set(expected) | {scale_name(place.name) for place in places if place.is_quantized}
    f8 = sum(prod(place.shape) for place in places if place.is_quantized)
    bias = sum(prod(place.shape) for place in places if place.is_gate_bias)
    bf16 = sum(prod(place.shape) for place in places) - f8 - bias
    scales = sum(prod(scale_shape((place.shape[0], place.shape[1]))) for place in places if place.is_quantized)
    assert (f8, bf16, bias + scales) == (680_571_043_840, 3_918_786_560, 41_555_600)
    assert f8 + 2 * bf16 + 4 * (bias + scales) == 688_574_839_360


def test_v2_lite_and_k2_as_released() -> None:
    lite = list(published_places(load_config("deepseek-v2-lite")))
    assert (len(lite), sum(prod(place.shape) for place in lite)) == (5_291, 15_706_484_224)
    config = load_config("kimi-k2")
    places = list(published_places(config))
    scales = [scale_shape((place.shape[0], place.shape[1])) for place in places if place.is_quantized]
    # The released files hold 61 stray inv_freq of 56 numbers besides.
    assert len(places) + len(scales) + 61 == 139_644
    assert sum(prod(place.shape) for place in places) + sum(map(prod, scales)) + 61 * 56 == 1_026_470_731_056
