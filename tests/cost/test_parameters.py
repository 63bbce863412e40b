"""Counts against the released checkpoints' own listings, and against transformers' and our modules at small sizes."""

import pytest

from fireflyer.config import ModelConfig, load_config
from fireflyer.cost.memory import bf16_checkpoint_bytes, decode_step_bytes, fp8_checkpoint_bytes
from fireflyer.cost.parameters import cache_bytes_per_token, count_parameters

# Elements of the released checkpoints' tensor listings, and figures of the reports and model cards.
PUBLISHED = {
    "deepseek-v2-lite": {
        "total": 15_706_484_224,
        "active": 2_451_435_008,
        "attention_layer": 13_763_072,
        "routed_expert": 8_650_752,
        "moe_ffn_layer": 571_080_704,
        "embedding": 209_715_200,
        "checkpoint": 15_706_484_224,
        "mtp": 0,
    },
    "deepseek-v2": {
        "total": 235_741_434_880,
        "active": 20_851_512_320,
        "attention_layer": 149_227_520,
        "routed_expert": 23_592_960,
        "moe_ffn_layer": 3_822_878_720,
        "embedding": 524_288_000,
        "mtp": 0,
    },
    "deepseek-v3": {
        "total": 671_026_419_200,
        "active": 36_625_618_432,
        "attention_layer": 187_107_328,
        "routed_expert": 44_040_192,
        "moe_ffn_layer": 11_320_164_608,
        "embedding": 926_679_040,
        "mtp": 11_610_068_224,
        "checkpoint": 684_489_845_504,
    },
    "moonlight": {
        "total": 15_960_110_208,
        "active": 2_579_231_872,
        "attention_layer": 13_763_072,
        "routed_expert": 8_650_752,
        "moe_ffn_layer": 571_080_768,
        "embedding": 335_544_320,
        "mtp": 0,
    },
    "kimi-k2": {
        "total": 1_026_408_232_448,
        "active": 31_687_095_808,
        "attention_layer": 101_124_096,
        "routed_expert": 44_040_192,
        "moe_ffn_layer": 16_958_226_816,
        "embedding": 1_174_405_120,
        "mtp": 0,
    },
}
CACHE_BYTES = {
    "deepseek-v2-lite": 31_104,
    "deepseek-v2": 69_120,
    "deepseek-v3": 70_272,
    "moonlight": 31_104,
    "kimi-k2": 70_272,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_integers(name: str):
    counts = count_parameters(load_config(name))
    assert {key: getattr(counts, key) for key in PUBLISHED[name]} == PUBLISHED[name]
    assert cache_bytes_per_token(load_config(name)) == CACHE_BYTES[name]


def test_the_figures_of_the_model_cards():
    v3, moonlight = (count_parameters(load_config(name)) for name in ("deepseek-v3", "moonlight"))
    hidden = 7168
    # README_WEIGHTS.md: 11.5B for the MTP module and 2.4B active in it, both without eh_proj.
    assert v3.mtp - 2 * hidden * hidden == pytest.approx(11.5e9, rel=0.001)
    assert v3.mtp_active + v3.embedding - 2 * hidden * hidden == pytest.approx(2.4e9, rel=0.02)
    # Moonlight: 15.29B and 2.24B, both without the embeddings.
    assert round((moonlight.total - 2 * moonlight.embedding) / 1e9, 2) == 15.29
    assert round((moonlight.active - moonlight.head) / 1e9, 2) == 2.24


def test_the_bytes_of_the_released_fp8_checkpoint():
    """680,571,043,840 numbers in E4M3, 3,918,786,560 in BF16, 41,555,600 in FP32."""
    config = load_config("deepseek-v3")
    assert fp8_checkpoint_bytes(config) == 680_571_043_840 + 2 * 3_918_786_560 + 4 * 41_555_600
    assert bf16_checkpoint_bytes(config) == 2 * 684_489_845_504 + 2 * 59 * 256


ODD = {
    "vocab_size": 97,
    "hidden_size": 200,
    "intermediate_size": 130,
    "moe_intermediate_size": 129,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 21,
    "kv_lora_rank": 33,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 2,
}
VARIANTS = [
    {},
    {"q_lora_rank": 0},
    {"tie_word_embeddings": True},
    {"first_k_dense_replace": 4},
    {"n_shared_experts": 0},
    {"n_routed_experts": 0},
    {"model_type": "deepseek_v2", "num_nextn_predict_layers": 0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_arithmetic_equals_the_files_tensor_by_tensor(variant: dict):
    """The published layout's own list of tensors: numbers, and bytes with one scale per block of each FP8 matrix."""
    from fireflyer.checkpoint.names import published_places

    config = ModelConfig.from_dict({**ODD, **variant})
    numbers = bf16 = fp8 = 0
    for place in published_places(config):
        size = 1
        for length in place.shape:
            size *= length
        numbers += size
        wide = 4 if place.is_gate_bias else 2
        bf16 += wide * size
        blocks = [-(-length // 128) for length in place.shape]
        fp8 += size + 4 * blocks[0] * blocks[1] if place.is_quantized else wide * size
    assert count_parameters(config).checkpoint == numbers
    assert bf16_checkpoint_bytes(config) == bf16
    assert fp8_checkpoint_bytes(config) == fp8


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_active_parameters_are_the_total_without_the_idle_ones(variant: dict):
    config = ModelConfig.from_dict({**ODD, **variant})
    counts = count_parameters(config)
    idle = (config.n_routed_experts - config.num_experts_per_tok) * counts.routed_expert
    num_moe = sum(config.is_moe(index) for index in range(4))
    look_up = 0 if config.tie_word_embeddings else counts.embedding
    assert counts.active == counts.total - look_up - num_moe * idle
    mtp_moe = config.num_nextn_predict_layers if config.n_routed_experts else 0
    heads = config.num_nextn_predict_layers * counts.embedding
    assert counts.mtp_active == counts.mtp + heads - mtp_moe * idle


def test_a_decode_step_reads_the_active_weights_and_the_cache() -> None:
    config = load_config("deepseek-v2-lite")
    counts = count_parameters(config)
    assert decode_step_bytes(config, [0], bytes_per_weight=1) == counts.active
    cached = decode_step_bytes(config, [100, 28]) - decode_step_bytes(config, [0, 0])
    assert cached == 128 * cache_bytes_per_token(config, 2)
    # A batch that uses every expert reads every weight but the embedding's.
    everything = decode_step_bytes(config, [0] * 64, experts_per_layer=config.n_routed_experts, bytes_per_weight=1)
    assert everything == counts.total - counts.embedding
