"""A layer's products against the parameter counts, its exchange by hand and by drawing, its time by the profile."""

import random
from dataclasses import replace

import pytest

from fireflyer.config import load_config
from fireflyer.cost.hardware import load_hardware
from fireflyer.cost.layer_time import (
    Rank,
    attention_products,
    block_times,
    exchange_seconds,
    ffn_products,
    head_times,
    mtp_times,
    places_reached,
)
from fireflyer.cost.parameters import count_parameters

V3 = load_config("deepseek-v3")
HARDWARE = load_hardware()
PROFILED = Rank(HARDWARE, HARDWARE.gpu("H800"), "fp8", 4096, 4096, 1, 64, "selective", True)


def _multiply_adds(shapes) -> int:
    return sum(rows * columns * depth * groups for rows, columns, depth, groups in shapes)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2-lite", "kimi-k2"])
def test_products_use_each_matrix_once_a_token(name: str):
    config = load_config(name)
    counts, hidden = count_parameters(config), config.hidden_size
    norms = config.kv_lora_rank + (config.q_lora_rank or 0)
    tokens = 4096
    assert _multiply_adds(attention_products(config, tokens, 1)) == tokens * (counts.attention_layer - norms)
    dense = _multiply_adds(ffn_products(config, tokens, 1, False))
    assert dense == tokens * counts.dense_ffn_layer == tokens * 3 * hidden * config.intermediate_size
    for ep in (1, 4, 32):
        routed = config.num_experts_per_tok * counts.routed_expert
        moe = _multiply_adds(ffn_products(config, tokens, ep, True))
        assert moe == pytest.approx(tokens * (routed + counts.shared_experts), rel=5e-3)  # whole rows an expert


def test_the_profiled_chunk_takes_as_long_as_its_profile():
    """Four MoE layers forward and backward, EP64, 4,096 tokens: 129.0 ms in deepseek-ai/profile-data.

    The rates come from that profile kernel by kernel; this checks that nothing is left out or counted twice when a
    layer is put together from them.
    """
    block = block_times(V3, PROFILED, moe=True)
    compute = 4 * (block.forward + block.backward)
    assert compute == pytest.approx(0.124258, rel=0.02)  # the time in which any compute kernel ran
    assert compute / HARDWARE.kernels.compute_busy == pytest.approx(0.129012, rel=0.02)
    assert 4 * (block.exchange_forward + block.exchange_backward) < compute


def test_exchange_by_hand():
    """4,096 tokens to 3.629 nodes of 8 on average, FP8 with scales at 51 GB/s out, BF16 at 50 GB/s back."""
    expected = 4096 * 3.62901 * (7168 * (1 + 4 / 128) / 51e9 + 7168 * 2 / 50e9)
    assert exchange_seconds(V3, PROFILED) == pytest.approx(expected, rel=1e-5)
    within = replace(PROFILED, ep=8)
    copies = places_reached(V3, 8)
    nvlink = 4096 * copies * (7168 * (1 + 4 / 128) / 153e9 + 7168 * 2 / 158e9)
    assert exchange_seconds(V3, within) == pytest.approx(nvlink, rel=1e-9)
    assert exchange_seconds(V3, replace(PROFILED, ep=1)) == 0
    assert exchange_seconds(V3, replace(PROFILED, precision="bf16")) > expected * 1.3


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "deepseek-v2-lite"])
@pytest.mark.parametrize("places", [1, 2, 5, 8, 18, 64])
def test_places_reached_by_drawing(name: str, places: int):
    config = load_config(name)
    draw = random.Random(places)
    experts, groups = config.n_routed_experts, config.n_group
    size, total, draws = experts // groups, 0, 2000
    for _ in range(draws):
        open_groups = draw.sample(range(groups), config.topk_group)
        reachable = [group * size + place for group in open_groups for place in range(size)]
        chosen = draw.sample(reachable, config.num_experts_per_tok)
        total += len({expert * places // experts for expert in chosen})
    assert places_reached(config, places) == pytest.approx(total / draws, rel=0.02)


def test_recomputation_costs_what_it_does_again():
    blocks = {
        kind: block_times(V3, replace(PROFILED, recompute=kind), moe=True) for kind in ("none", "selective", "full")
    }
    again = blocks["full"].backward - blocks["none"].backward
    assert again == pytest.approx(blocks["none"].forward)
    assert blocks["none"].backward < blocks["selective"].backward < blocks["full"].backward
    assert blocks["full"].exchange_backward == pytest.approx(2 * blocks["none"].exchange_backward)
    assert len({block.forward for block in blocks.values()}) == 1


def test_head_and_mtp():
    head = head_times(V3, PROFILED)
    bf16 = 794.5e12 * 112 / 132
    assert head.forward == pytest.approx(2 * 4096 * 129280 * 7168 / bf16)
    assert head.backward == 2 * head.forward
    joint = 2 * 4096 * 7168 * 2 * 7168 / bf16
    expected = joint + block_times(V3, PROFILED, moe=True).forward + head.forward
    assert mtp_times(V3, PROFILED).forward == pytest.approx(expected)
    assert mtp_times(load_config("kimi-k2"), PROFILED).forward == 0


def test_context_ranks_share_queries_and_gather_keys():
    long = replace(PROFILED, seq_len=131072, tokens=131072, ep=1, hides_exchange=False)
    spread = replace(long, tokens=131072 // 8, cp=8)
    whole, part = (block_times(V3, rank, moe=False) for rank in (long, spread))
    keys_and_values = [shape for shape in attention_products(V3, spread.tokens, 8) if shape[1] == 128 * (128 + 128)]
    assert keys_and_values == [(131072, 32768, 512, 1)]  # each rank makes them for all of the sequence
    assert whole.forward / 8 < part.forward < whole.forward / 8 * 1.2
    assert part.exchange_forward == pytest.approx(131072 // 8 * 7 * 576 * 2 / 50e9)
