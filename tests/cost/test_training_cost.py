"""Operations and money of V3's run against the figures of its report and of arXiv 2505.09343."""

import pytest

from fireflyer.config import ModelConfig, load_config
from fireflyer.cost import v3_run
from fireflyer.cost.flops import mtp_training_flops_per_token, training_flops_per_token


def test_v3_takes_250_gflop_a_token():
    flops = training_flops_per_token(load_config("deepseek-v3"), 4096)
    assert flops / 1e9 == pytest.approx(250.456, abs=5e-4)
    assert round(flops / 1e9) == 250


def test_mtp_adds_its_block_its_projection_and_the_head():
    config = load_config("deepseek-v3")
    hidden = config.hidden_size
    attention = 187_107_328
    experts = 9 * 44_040_192 + 256 * hidden + 256
    parameters = attention + experts + 2 * hidden + 3 * hidden + 2 * hidden * hidden + 129_280 * hidden
    scores = 3 * 2 * 128 * (192 + 128) * 4096 / 2
    assert mtp_training_flops_per_token(config, 4096) == pytest.approx(6 * parameters + scores, rel=1e-12)
    assert mtp_training_flops_per_token(config.replace(num_nextn_predict_layers=0), 4096) == 0


def test_operations_equal_a_count_of_every_product_of_a_small_model():
    """A naive walk over the matrix products of one token, three times for forward and backward."""
    config = ModelConfig.from_dict(
        {
            "vocab_size": 50,
            "hidden_size": 16,
            "intermediate_size": 40,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.0,
            "max_position_embeddings": 64,
        }
    )
    attention = [(16, 12), (12, 2 * 10), (16, 10 + 4), (10, 2 * (6 + 5)), (2 * 5, 16)]
    dense = [(16, 40)] * 3
    moe = [(16, 8)] + [(16, 8)] * 3 * 3
    products = 3 * attention + dense + 2 * moe + [(16, 50)]
    vectors = 16 + 3 * (2 * 16 + 12 + 10) + 2 * 8
    keys = 64 / 2
    scores = 3 * 2 * (10 + 5) * keys
    expected = 3 * 2 * (sum(rows * columns for rows, columns in products) + vectors + scores)
    assert training_flops_per_token(config, 64) == expected


def test_the_report_s_hours_and_dollars():
    assert v3_run.pretraining_gpu_hours() == pytest.approx(2_664_000)
    assert v3_run.total_gpu_hours() == pytest.approx(2_788_000)
    assert v3_run.usd(v3_run.total_gpu_hours()) == pytest.approx(5_576_000)
    # "3.7 days on our cluster with 2048 H800 GPUs" a trillion tokens.
    assert round(v3_run.pretraining_gpu_hours(1e12) / v3_run.NUM_GPUS / 24, 1) == 3.7


def test_the_share_of_the_machine_s_peak():
    """arXiv 2505.09343, table 4: 272.8B tokens a day on 2048 GPUs, MFU 38.94% with causal attention."""
    assert v3_run.tokens_per_s_per_gpu() * 86400 * v3_run.NUM_GPUS / 1e9 == pytest.approx(272.8, rel=0.002)
    flops = training_flops_per_token(load_config("deepseek-v3"), v3_run.SEQ_LEN) * v3_run.tokens_per_s_per_gpu()
    assert flops / v3_run.H800_BF16_FLOPS_PER_S == pytest.approx(0.3894, rel=0.005)
