"""Serving units against DeepSeek's production, the published day's money, and lower bounds by hand."""

from dataclasses import replace

import pytest

from fireflyer.config import load_config
from fireflyer.cost import production_day
from fireflyer.cost.hardware import load_hardware
from fireflyer.cost.layer_time import Rank
from fireflyer.cost.serving_plan import (
    ServingJob,
    decode_layer,
    decode_step,
    decode_unit,
    experts_per_gpu,
    low_latency_seconds,
    plan_serving,
    prefill_unit,
    room_for_cache,
    unit_complaint,
    weights_bytes,
)

HARDWARE = load_hardware()
V3 = load_config("deepseek-v3")
JOB = ServingJob(V3, HARDWARE, HARDWARE.gpu("H800"), 320, "fp8", 4096, 1786)  # 4,989 in the cache, as in production


def test_the_published_day():
    assert production_day.cost_usd() == pytest.approx(87_072)
    assert production_day.margin(production_day.PUBLISHED_REVENUE_USD) == pytest.approx(5.45, abs=0.005)
    # From the published token counts, which are rounded to billions.
    assert production_day.revenue_usd() == pytest.approx(production_day.PUBLISHED_REVENUE_USD, rel=2e-4)
    assert production_day.margin(production_day.revenue_usd()) == pytest.approx(5.45, abs=0.01)


@pytest.mark.parametrize(("gpus", "held"), [(32, 9), (144, 2), (320, 1), (1, 256)])
def test_experts_of_a_gpu_as_in_production_and_in_the_report(gpus: int, held: int):
    assert experts_per_gpu(V3, gpus) == held


def test_weights_of_a_decode_gpu_by_hand():
    scaled = 1 + 4 / 16384
    matrices = 61 * 187_107_328 + 3 * 396_361_728 + 58 * (44_040_192 + 2 * 44_040_192)
    plain = 2 * 926_679_040 + 58 * (256 * 7168 + 256)
    assert weights_bytes(V3, 144, "fp8") == pytest.approx(matrices * scaled + 2 * plain)
    one = weights_bytes(V3, 1, "bf16")
    assert one == pytest.approx(2 * 671_026_419_200, rel=1e-4)  # all but the norms


def test_units_stay_within_memory_and_users_speed():
    for gpus in (16, 32, 144, 320):
        unit = decode_unit(JOB, gpus)
        assert unit is not None
        assert unit.weights_bytes + unit.cache_bytes < 84.94e9 * 0.95
        assert unit.cache_bytes == pytest.approx(unit.batch * 4989 * 70_272)
        assert 1 / unit.step_s >= 20
        assert unit.tokens_per_s_per_gpu == pytest.approx(unit.batch / unit.step_s)
    assert decode_unit(JOB, 8) is None
    assert prefill_unit(JOB, 8) is None


def test_the_batch_is_the_best_of_all():
    """Brute force over every batch on the search's grid."""
    unit = decode_unit(JOB, 32)
    assert unit is not None
    speeds = {}
    for batch in [1, 2, 4, *range(8, 200, 8)]:
        step, _ = decode_step(JOB, 32, batch)
        if batch * 4989 * 70_272 + unit.weights_bytes < 84.94e9 * 0.95 - 1e9 and 1 / step >= 20:
            speeds[batch] = batch / step
    assert unit.tokens_per_s_per_gpu >= max(speeds.values())


def test_a_step_reads_weights_and_cache_at_least():
    for batch in (1, 8, 64):
        step, _ = decode_step(JOB, 144, batch)
        # All but the embedding and those of its experts that no token comes to.
        cached = batch * 4989 * 70_272
        attention = 61 * 187_107_328 + 926_679_040 * 2
        assert step > (attention + cached) / 3350e9
        assert step > decode_step(JOB, 144, max(1, batch // 2))[0] * 0.99


def _rank(tokens: int, ep: int, precision: str = "fp8", gpu=JOB.gpu) -> Rank:
    return Rank(HARDWARE, gpu, precision, tokens, 4096, 1, ep, "none", False)


def test_exchange_is_deepep_s():
    """128 tokens over 128 GPUs: 192 us out and 369 us back; BF16 takes twice as long on the way out."""
    assert low_latency_seconds(JOB, _rank(128, 128)) == pytest.approx(561e-6)
    assert low_latency_seconds(JOB, _rank(32, 128)) == pytest.approx(561e-6 / 4)
    assert low_latency_seconds(JOB, _rank(128, 8)) == pytest.approx((77 + 114) * 1e-6)
    assert low_latency_seconds(replace(JOB, precision="bf16"), _rank(128, 128)) == pytest.approx(753e-6)
    faster = replace(JOB.gpu, network_gb_per_s=100, nvlink_gb_per_s=640)
    assert low_latency_seconds(JOB, _rank(128, 128, gpu=faster)) == pytest.approx(561e-6 / 2)
    assert low_latency_seconds(JOB, _rank(128, 8, gpu=faster)) == pytest.approx((77 + 114) * 1e-6 / 4)
    assert low_latency_seconds(JOB, _rank(128, 1)) == 0


def test_attention_is_bound_by_the_cache_or_by_its_products():
    """4,096 more tokens in the cache of 64 requests: 576 numbers of BF16 each, or two products of 128 heads."""
    longer = replace(JOB, prompt=JOB.prompt + 4096)
    for gpu, expected in (
        (replace(JOB.gpu, bf16_tflops=1e6, bf16_matmul_tflops=1e6), 64 * 4096 * 576 * 2 / 3000e9),
        (JOB.gpu, 64 * 4096 * 2 * 128 * (576 + 512) / 660e12),
    ):
        short, long = (decode_layer(job, _rank(64, 144, gpu=gpu), 64, 1, moe=True) for job in (JOB, longer))
        assert long - short == pytest.approx(expected)


def test_two_micro_batches_pay_where_exchange_is_long():
    assert decode_step(JOB, 144, 128)[1] == 2
    assert decode_step(JOB, 144, 1)[1] == 1
    plan = prefill_unit(JOB, 32)
    assert plan is not None
    assert plan.micro_batches == 2


def test_production_s_units_bound_what_production_reached():
    """A day's mean over uneven loads lies below full units: above half of them, and never beyond."""
    plan = plan_serving(JOB, 32, 144)
    assert plan is not None
    decode = 8 * plan.decode.tokens_per_s_per_gpu
    fresh = production_day.INPUT_TOKENS_PER_S_PER_NODE * (1 - 342 / 608)
    assert 0.4 * decode < production_day.OUTPUT_TOKENS_PER_S_PER_NODE < decode
    assert 0.4 * 8 * plan.prefill.tokens_per_s_per_gpu < fresh < 8 * plan.prefill.tokens_per_s_per_gpu


def test_a_larger_unit_must_be_faster():
    """Of all sizes, the smallest within 1% of the fastest."""
    plan = plan_serving(JOB, None, None)
    assert plan is not None
    speeds = {
        gpus: unit.tokens_per_s_per_gpu
        for gpus in (16, 32, 64, 72, 128, 144, 256, 320)
        if (unit := decode_unit(JOB, gpus))
    }
    assert plan.decode.gpus == min(gpus for gpus, speed in speeds.items() if speed >= 0.99 * max(speeds.values()))
    assert plan.prefill.gpus == 16


def test_drafts_need_room_for_their_module():
    plain, drafting = (room_for_cache(replace(JOB, mtp_acceptance=share), 144, 256) for share in (0.0, 0.85))
    assert plain - drafting == pytest.approx(weights_bytes(V3, 144, "fp8") / 61)


def test_drafts_and_cache_hits_help():
    plain, drafted = (decode_unit(replace(JOB, mtp_acceptance=share), 144) for share in (0.0, 0.85))
    assert plain is not None
    assert drafted is not None
    assert decode_step(replace(JOB, mtp_acceptance=0.85), 144, 128)[0] > 1.3 * decode_step(JOB, 144, 128)[0]
    assert 1.05 < drafted.tokens_per_s_per_gpu / plain.tokens_per_s_per_gpu < 1.85
    cold, warm = (prefill_unit(replace(JOB, cache_hits=share), 32) for share in (0.0, 0.5))
    assert cold is not None
    assert warm is not None
    assert warm.tokens_per_s_per_gpu == pytest.approx(2 * cold.tokens_per_s_per_gpu)


def test_small_models_need_no_cluster():
    job = ServingJob(load_config("deepseek-v2-lite"), HARDWARE, HARDWARE.gpu("A100"), 1, "bf16", 2048, 256)
    plan = plan_serving(job, None, None)
    assert plan is not None
    assert (plan.prefill.gpus, plan.decode.gpus) == (1, 1)
    assert plan.decode.tokens_per_s_per_gpu > 1000


def test_one_request_reads_its_own_experts_only():
    """V2-Lite in BF16 on an A100: more than 2.45e9 active numbers, far less than all 15.7e9."""
    job = ServingJob(load_config("deepseek-v2-lite"), HARDWARE, HARDWARE.gpu("A100"), 1, "bf16", 2048, 256)
    step, micro_batches = decode_step(job, 1, 1)
    assert 2 * 2.45e9 / 2000e9 < step < 0.4 * 2 * 15.7e9 / 2000e9
    assert micro_batches == 1


def test_what_does_not_fit_names_what_does():
    job = replace(JOB, count=8)
    assert plan_serving(job, None, None) is None
    said = unit_complaint(job, None, None, "deepseek-v3")
    assert "doesn't fit into prefill units of 8 H800: weights take 103.4 GB of 80.7" in said
    assert "the nearest that fits is --count 16" in said
    assert plan_serving(replace(JOB, count=16), None, None) is not None
