"""The search against brute force, by-hand layouts and their refusals, and the gates on V3's run."""

from dataclasses import replace
from itertools import product

import pytest

from fireflyer.config import load_config
from fireflyer.cost import v3_run
from fireflyer.cost.hardware import load_hardware
from fireflyer.cost.judge import Judge
from fireflyer.cost.layer_time import Rank, block_times
from fireflyer.cost.layout_checks import check_wanted, describe, fastest
from fireflyer.cost.layouts import Job, Layout, Wanted, layouts
from fireflyer.cost.memory_plan import Spread, rank_memory, rank_parameters
from fireflyer.cost.parameters import count_parameters
from fireflyer.cost.plan import leanest, search
from fireflyer.cost.stages import RankLayers
from fireflyer.cost.training_cost import training_cost
from fireflyer.errors import UserError

HARDWARE = load_hardware()
V3, LITE = load_config("deepseek-v3"), load_config("deepseek-v2-lite")
RUN = Job(V3, HARDWARE, HARDWARE.gpu("H800"), 2048, 4096, 15360, "fp8")
SMALL = Job(LITE, HARDWARE, HARDWARE.gpu("H100"), 8, 4096, 64, "bf16")
REPORTED = Layout(16, 128, 1, 64, 1, 1, "selective", "dualpipe", 2)


def _by_brute_force(job: Job) -> list[Layout]:
    """Every tuple of small numbers, kept where the rules hold; written without the search's own loops."""
    sizes = range(1, job.count + 1)
    kinds = [("1f1b", 1), ("zero-bubble", 1), ("dualpipe", 2), ("dualpipev", 2), ("interleaved", 2), ("interleaved", 4)]
    found = []
    for pp, dp, ep in product(sizes, sizes, sizes):
        if pp * dp != job.count or dp % ep or job.config.n_routed_experts % ep or job.global_batch % dp:
            continue
        for (schedule, chunks), micro, zero in product(kinds, (1, 2, 4, 8), (1, 2, 3)):
            sequences = job.global_batch // dp
            batches = sequences // micro
            if sequences % micro or (dp == 1 and zero > 1):
                continue
            if pp == 1 and schedule not in ("1f1b", "dualpipev"):
                continue
            if schedule in ("dualpipe", "dualpipev") and batches < 2 * pp:
                continue
            if (schedule == "dualpipe" and (pp % 2 or batches % 2)) or (schedule == "interleaved" and batches % pp):
                continue
            found += [
                Layout(pp, dp, 1, ep, zero, micro, recompute, schedule, chunks)
                for recompute in ("none", "selective", "full")
            ]
    return found


@pytest.mark.parametrize(("count", "batch", "gpu"), [(8, 64, "H100"), (4, 12, "A100"), (6, 24, "H200"), (1, 8, "H200")])
def test_the_search_is_brute_force(count: int, batch: int, gpu: str):
    job = replace(SMALL, count=count, global_batch=batch, gpu=HARDWARE.gpu(gpu))
    everything = _by_brute_force(job)
    assert sorted(map(str, layouts(job, Wanted()))) == sorted(map(str, everything))
    judge = Judge(job)
    judged = [plan for layout in everything if (plan := judge(layout))]
    fitting = [plan for plan in judged if plan.memory.total <= job.gpu.memory_gb * 0.95e9]
    best = min(fitting, key=lambda plan: (plan.step.total, plan.memory.total), default=None)
    assert search(job) == best
    assert search(job, must_fit=False) == min(judged, key=lambda plan: (plan.step.total, plan.memory.total))
    least = leanest(job)
    assert least is not None
    assert least.memory.total == min(plan.memory.total for plan in judged)


def test_context_ranks_are_tried_where_sequences_are_long():
    job = replace(RUN, seq_len=131072, global_batch=512)
    assert {layout.cp for layout in layouts(job, Wanted())} == {1, 2, 4, 8, 16, 32}
    assert all(
        layout.world == 2048 and (layout.dp * layout.cp) % layout.ep == 0 for layout in layouts(job, Wanted(pp=16))
    )
    assert {layout.cp for layout in layouts(RUN, Wanted())} == {1}


def test_context_ranks_are_left_out_where_sequences_are_short():
    assert {layout.cp for layout in layouts(replace(RUN, seq_len=16384), Wanted())} == {1}
    assert RUN.memory_bytes == pytest.approx(84.94e9 * 0.95)


def _judged(layout: Layout, **changes: float):
    plan = Judge(replace(RUN, gpu=replace(RUN.gpu, **changes)))(layout)
    assert plan is not None
    return plan


def test_a_chunk_shows_what_is_not_hidden():
    """Without overlap the passing of 4,096 BF16 hidden states lies open; with it the longer of two parts counts."""
    slow, fast = (_judged(replace(REPORTED, ep=1, schedule="1f1b", chunks=1), network_gb_per_s=g) for g in (50, 1e9))
    assert slow.times.forward - fast.times.forward == pytest.approx(2 * 4096 * 7168 / 50e9)
    assert slow.times.backward - fast.times.backward == pytest.approx(2 * 4096 * 7168 / 50e9)
    bound = _judged(REPORTED, network_gb_per_s=5)
    exchanged = bound.all_to_all_s / 120 + 2 * 2 * 4096 * 7168 / 5e9
    assert bound.times.overlapped == pytest.approx(exchanged / HARDWARE.kernels.compute_busy)
    assert _judged(REPORTED, network_gb_per_s=1e9).times.overlapped == _judged(REPORTED).times.overlapped


def test_the_slowest_rank_sets_the_pace_of_each_kind_of_chunk():
    """Lone chunks show their all-to-all and are longest on a rank with four MoE layers a stage, not on the head's; the
    overlapped pair is longest where most is computed."""
    plan = _judged(REPORTED)
    rank = Rank(HARDWARE, RUN.gpu, "fp8", 4096, 4096, 1, 64, "selective", True)
    layer = block_times(V3, rank, moe=True)
    passed = 2 * 4096 * 7168 / 50e9
    assert plan.times.forward == pytest.approx(4 * (layer.forward + layer.exchange_forward) + passed)
    assert plan.times.backward == pytest.approx(4 * (layer.backward + layer.exchange_backward) + passed)
    assert plan.times.overlapped > 4 * (layer.forward + layer.backward) / HARDWARE.kernels.compute_busy


def test_the_fullest_rank_counts():
    """Of 1F1B: rank r of 16 holds 16 - r micro-batches, and later ranks have a layer more."""
    layout = replace(REPORTED, schedule="1f1b", chunks=1)
    plan = _judged(layout)
    assert plan.fits
    counts = count_parameters(V3)
    layers = [RankLayers(3, 1, True, False, 0), *(RankLayers(0, 4, False, False, rank) for rank in range(1, 15))]
    layers.append(RankLayers(0, 1, False, True, 15))
    memories = [
        rank_memory(
            V3,
            rank,
            rank_parameters(V3, counts, rank, 64),
            Spread("fp8", "selective", 1, 128, 64, 4096, 1, 16 - rank.rank),
        ).total
        for rank in layers
    ]
    assert plan.memory.total == pytest.approx(max(memories))


def test_gradients_hide_behind_the_backward_as_far_as_it_lasts():
    seconds = {
        (zero, link): _judged(replace(REPORTED, zero=zero), network_gb_per_s=link).step.gradients
        for zero in (1, 2, 3)
        for link in (10, 1000)
    }
    assert seconds[1, 10] < seconds[2, 10] < seconds[3, 10]
    assert seconds[1, 1000] == seconds[2, 1000] == seconds[3, 1000]
    assert seconds[1, 10] == pytest.approx(100 * seconds[1, 1000])


def test_the_optimizer_touches_a_rank_s_share_only():
    """Of eight layers: four experts each, which two data ranks share, and what all 128 share."""
    ordinary = 8 * 4 * 44_040_192 / 2 + 8 * (187_107_328 + 44_040_192) / 128
    assert _judged(REPORTED).step.optimizer == pytest.approx(22 * ordinary / 3350e9, rel=0.02)


def test_what_is_fixed_stays_fixed():
    wanted = Wanted(pp=8, dp=256, ep=16, zero=2, micro_batch=2, recompute="full", schedule="1f1b")
    found = search(RUN, wanted)
    assert found is not None
    assert found.layout == Layout(8, 256, 1, 16, 2, 2, "full", "1f1b")


def test_a_step_adds_up():
    plan = Judge(RUN)(REPORTED)
    assert plan is not None
    step = plan.step
    assert step.total == pytest.approx(step.chunks + step.bubble + step.gradients + step.optimizer)
    assert plan.tokens_per_s == pytest.approx(15360 * 4096 / step.total)
    assert plan.mfu == pytest.approx(250.456e9 * plan.tokens_per_s / 2048 / 989e12, rel=1e-4)
    # The bubble of 16 ranks from the report's formula, with the plan's own chunk times.
    times = plan.times
    assert step.bubble == pytest.approx(7 * (times.overlapped + times.backward - 3 * times.weights))
    # Gradients in FP32 summed and parameters in BF16 collected: the first rank's at 50 GB/s, dense ones over 128 ranks.
    assert 0.2 < step.gradients < 0.8


def test_hours_of_v3s_run_are_predicted_within_ten_percent():
    """From rates of hardware alone: nothing in hardware.toml comes from the run's hours. As trained, and as found."""
    for plan in (Judge(RUN)(REPORTED), search(RUN)):
        assert plan is not None
        assert plan.fits
        hours = 14.8e12 / plan.tokens_per_s * 2048 / 3600
        assert hours == pytest.approx(2_664_000, rel=0.10)


def test_the_layout_found_is_nearly_the_one_trained_with():
    found = search(RUN)
    assert found is not None
    assert (found.layout.pp, found.layout.zero, found.layout.micro_batch) == (16, 1, 1)
    assert (found.layout.schedule, found.layout.recompute) == ("dualpipe", "selective")
    assert found.layout.ep in (32, 64)


def test_given_hours_make_the_published_money():
    plan = Judge(RUN)(REPORTED)
    assert plan is not None
    cost = training_cost(RUN, plan, tokens=14.8e12, usd_per_hour=2.0, hours_per_trillion=180_000)
    assert cost.train["gflop_per_token"] == pytest.approx(250.5, rel=0.005)
    assert cost.train["device_hours"] == pytest.approx(2_664_000)
    assert cost.total["context_extension_hours"] == pytest.approx(119_000)
    assert cost.total["post_training_hours"] == pytest.approx(5_000)
    assert cost.total["device_hours"] == pytest.approx(2_788_000) == v3_run.total_gpu_hours()
    assert cost.total["usd"] == pytest.approx(5_576_000)
    assert cost.train["days"] == pytest.approx(54.2, abs=0.05)
    assert cost.train["tokens_per_s"] / 2048 == pytest.approx(1543, abs=0.5)


def test_predicted_hours_scale_the_later_phases():
    plan = Judge(RUN)(REPORTED)
    assert plan is not None
    cost = training_cost(RUN, plan, tokens=14.8e12, usd_per_hour=None)
    ratio = cost.train["device_hours"] / 2_664_000
    assert cost.total["device_hours"] == pytest.approx(2_788_000 * ratio)
    assert cost.total["usd"] is cost.train["usd"] is None
    half = training_cost(RUN, plan, tokens=7.4e12, usd_per_hour=None)
    assert half.total["device_hours"] == pytest.approx(cost.total["device_hours"] / 2)
    own = training_cost(RUN, plan, tokens=1e12, usd_per_hour=3.0, context_hours=7, post_hours=0)
    assert own.total["device_hours"] == pytest.approx(own.train["device_hours"] + 7)
    assert own.total["usd"] == pytest.approx(3 * own.total["device_hours"])


REFUSED = [
    (Wanted(pp=15), "--pp 15 doesn't divide --count 2,048; give 8 or 16"),
    (Wanted(dp=100), "--dp 100 doesn't divide --count 2,048; give 64 or 128"),
    (Wanted(cp=3), "--cp 3 doesn't divide --count 2,048; give 2 or 4"),
    (Wanted(pp=16, dp=64), "--pp 16 --dp 64 is 1,024 of --count 2,048 GPUs; give --dp 128 or --count 1,024"),
    (Wanted(pp=16, dp=64, cp=1), "give --dp 128"),
    (Wanted(pp=64, dp=64), "4,096 ranks don't divide --count 2,048"),
    (Wanted(pp=128), "--pp 128 is above the 61 layers; give 32 or less"),
    (Wanted(ep=48), "--ep 48 doesn't divide 256 routed experts; give 32 or 64"),
    (Wanted(pp=32, ep=128), "--ep 128 doesn't divide dp x cp = 64; give 64"),
    (Wanted(pp=16, micro_batch=7), "--micro-batch 7 doesn't divide the 120 sequences of a rank; give 6 or 8"),
    (Wanted(pp=1, schedule="zero-bubble"), "zero-bubble needs a pipeline, and pp is 1; give 1f1b or dualpipev"),
    (
        Wanted(pp=32, micro_batch=8, schedule="dualpipe"),
        "dualpipe needs 64 micro-batches for 32 ranks, and there are 30",
    ),
]


@pytest.mark.parametrize(("wanted", "said"), REFUSED)
def test_a_layout_that_cannot_be_says_which_number_and_what_would(wanted: Wanted, said: str):
    with pytest.raises(UserError) as refused:
        check_wanted(RUN, wanted)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_context_ranks_must_divide_the_sequence():
    with pytest.raises(UserError, match="--cp 32 doesn't divide --seq-len 6,000; give 30 or 40"):
        check_wanted(replace(RUN, seq_len=6000), Wanted(cp=32))


def test_what_the_refusals_offer_is_accepted():
    for good in (Wanted(pp=16), Wanted(dp=128), Wanted(pp=16, dp=128), Wanted(ep=64), Wanted(pp=16, micro_batch=8)):
        check_wanted(RUN, good)
        assert fastest(RUN, good, "deepseek-v3").fits
    with pytest.raises(UserError, match=r"1,000 sequences can't be shared out on 2,048 GPUs.*give 960 or 1,024"):
        fastest(replace(RUN, global_batch=1000), Wanted(), "deepseek-v3")
    assert fastest(replace(RUN, global_batch=1024), Wanted(), "deepseek-v3").fits
    with pytest.raises(UserError, match="--global-batch 1,000 doesn't divide among dp 128; give 896 or 1,024"):
        fastest(replace(RUN, global_batch=1000), Wanted(pp=16), "deepseek-v3")


def test_a_plan_that_cannot_fit_names_the_nearest_that_does():
    few = replace(SMALL, count=1)
    with pytest.raises(UserError) as refused:
        fastest(few, Wanted(), "deepseek-v2-lite")
    said = str(refused.value)
    assert "deepseek-v2-lite in bf16 doesn't fit on 1 H100: it needs at least" in said
    count = int(said.split("the nearest that fits is --count ")[1].split()[0])
    found = search(replace(few, count=count))
    assert found is not None
    assert describe(found) in said
    assert search(replace(few, count=count // 2)) is None


def test_a_layout_that_cannot_fit_names_one_that_keeps_most_of_it():
    wanted = Wanted(pp=16, dp=128, ep=64, zero=1, recompute="none", schedule="dualpipe")
    with pytest.raises(UserError) as refused:
        fastest(RUN, wanted, "deepseek-v3")
    said = str(refused.value)
    assert "doesn't fit on 2,048 H800 in this layout" in said
    assert "the nearest that fits is pp 16, dp 128, ep 64, zero 1, micro-batch 1, dualpipe, recompute selective" in said
