"""Memory of a rank: a worked example, sums over ranks against the published counts, what sharding divides."""

from dataclasses import replace

import pytest

from fireflyer.config import load_config
from fireflyer.cost.memory_plan import RankParameters, Spread, layer_activations, rank_memory, rank_parameters
from fireflyer.cost.parameters import count_parameters
from fireflyer.cost.pipeline import Pipeline
from fireflyer.cost.stages import RankLayers, place_layers

V3 = load_config("deepseek-v3")
COUNTS = count_parameters(V3)
SPREAD = Spread("fp8", "selective", 1, 128, 64, 4096, 2, 17)


def test_one_rank_holds_the_whole_model():
    whole = rank_parameters(V3, COUNTS, RankLayers(3, 58, True, True), 1)
    assert whole.total == 671_026_419_200 + 11_610_068_224
    assert whole.experts == 59 * 256 * 44_040_192


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "kimi-k2"])
def test_ranks_together_hold_every_number_once(name: str):
    """Pipeline ranks of their own and expert ranks of their own; only MTP's rank has a second copy of the embedding."""
    config = load_config(name)
    counts = count_parameters(config)
    layers = [RankLayers(config.first_k_dense_replace, 2, True, False), RankLayers(0, 7, False, False)]
    rest = config.num_hidden_layers - config.first_k_dense_replace - 9
    layers.append(RankLayers(0, rest, False, True))
    parts = [rank_parameters(config, counts, rank, 4) for rank in layers]
    copied = counts.embedding if config.num_nextn_predict_layers else 0
    total = sum(part.dense + part.plain + 4 * part.experts for part in parts)
    assert total == counts.total + counts.mtp + copied


def test_an_ordinary_rank_of_v3_by_hand():
    """Eight MoE layers of DualPipe's two stages, EP64 of 256: four experts a layer."""
    layers = RankLayers(0, 8, False, False)
    parameters = rank_parameters(V3, COUNTS, layers, 64)
    dense = 8 * (187_107_328 + 44_040_192)
    experts = 8 * 4 * 44_040_192
    plain = 8 * (256 * 7168 + 256 + 2 * 7168)
    assert parameters == RankParameters(dense, experts, plain)
    memory = rank_memory(V3, layers, parameters, SPREAD)
    assert memory.weights == pytest.approx((dense + experts) * (1 + 4 / 16384) + 2 * plain)
    assert memory.gradients == 4 * (dense + experts + plain)
    assert memory.optimizer == pytest.approx(8 * ((dense + plain) / 128 + experts / 2))
    # Per token and layer: two BF16 hidden states, latents 1536 + 576 in BF16, attention's output 128 x 128 in 12 bits
    # and its sums, the gate's scores in FP32, eight FP8 hidden states dispatched, nine SwiGLU inputs of 4,096 in FP8.
    kept = 2 * 2 * 7168 + 2 * 2112 + 1.5 * 16384 + 4 * 128 + 4 * 256 + 8 * 7168 + 9 * 4096
    assert layer_activations(V3, SPREAD, moe=True) == kept == 153_216
    assert memory.activations == pytest.approx(17 * 4 * 4096 * kept)
    assert memory.buffers == 4096 * 4 * max(128 * (192 + 128 + 256), 9 * (7168 + 3 * 2048))


def test_the_report_s_layout_fits_its_card():
    """PP16, EP64, ZeRO-1, DualPipe, V3's recomputation, as trained: the fullest rank has embedding and head."""
    pipeline = Pipeline("dualpipe", 16, 120, 2)
    ranks = place_layers(3, 61, pipeline, tail=3.2)
    assert ranks is not None
    held = [rank_memory(V3, rank, rank_parameters(V3, COUNTS, rank, 64), SPREAD).total for rank in ranks]
    assert 60e9 < max(held) < 80.7e9


def test_zero_divides_what_it_names():
    layers = RankLayers(0, 8, False, False)
    parameters = rank_parameters(V3, COUNTS, layers, 64)
    one, two, three = (rank_memory(V3, layers, parameters, replace(SPREAD, zero=zero)) for zero in (1, 2, 3))
    assert one.weights == two.weights
    assert one.gradients > two.gradients == three.gradients
    assert two.gradients == pytest.approx(4 * ((parameters.dense + parameters.plain) / 128 + parameters.experts / 2))
    assert three.weights < two.weights
    assert one.optimizer == two.optimizer == three.optimizer


def test_recomputation_and_precision_order():
    kept = {
        (precision, kind): layer_activations(V3, replace(SPREAD, precision=precision, recompute=kind), moe=True)
        for precision in ("fp8", "bf16")
        for kind in ("none", "selective", "full")
    }
    for precision in ("fp8", "bf16"):
        assert kept[precision, "none"] > kept[precision, "selective"] > kept[precision, "full"] == 2 * 7168
    assert kept["bf16", "selective"] > 1.5 * kept["fp8", "selective"]


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble", "interleaved", "dualpipe", "dualpipev"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 10, 16])
def test_layers_are_placed_as_evenly_as_a_search_over_all_counts_would(schedule: str, ranks: int):
    """Brute force over the layers beside the tail: none gives a lighter heaviest rank."""
    chunks = 2 if schedule in ("interleaved", "dualpipe", "dualpipev") else 1
    pipeline = Pipeline(schedule, ranks, 4 * ranks, chunks)
    holders = pipeline.ranks // pipeline.copies
    if holders < 1 or (schedule in ("dualpipe", "interleaved") and ranks == 1):
        return
    tail = 3.2
    placed = place_layers(3, 61, pipeline, tail)
    assert placed is not None
    heaviest = max(rank.dense + rank.moe + (tail if rank.tail else 0) for rank in placed)
    others = holders - 1
    best = (
        min(
            (max(beside + tail, -(-(61 - beside) // others)) for beside in range(1, 62 - others * chunks)),
            default=61 + tail,
        )
        if others
        else 61 + tail
    )
    assert heaviest == pytest.approx(best)
    assert placed[0].embedding
    assert sum(rank.tail for rank in placed) == 1
    assert placed[0].dense == 3 or ranks >= 10


def test_dense_layers_are_in_the_first_stages():
    """Interleaved, a rank's first stage has about half of its layers, and dense ones beyond it go to the next rank."""
    placed = place_layers(3, 61, Pipeline("interleaved", 16, 32, 2), tail=3.2)
    assert placed is not None
    assert [rank.dense for rank in placed] == [2, 1, 0, 0]
    assert [rank.rank for rank in placed] == [0, 1, 14, 15]
    assert place_layers(3, 61, Pipeline("1f1b", 16, 32), 3.2)[0].dense == 3  # pyright: ignore[reportOptionalSubscript]


def test_logits_pass_through_the_last_rank():
    tail = RankLayers(0, 2, False, True)
    memory = rank_memory(V3, tail, rank_parameters(V3, COUNTS, tail, 64), SPREAD)
    assert memory.buffers == 4096 * (2 + 4) * 129_280  # BF16 logits and their FP32 gradient


def test_more_stages_than_layers_cannot_be():
    assert place_layers(0, 6, Pipeline("interleaved", 4, 8, 2), 1.0) is None
    assert place_layers(0, 8, Pipeline("interleaved", 4, 8, 2), 0.1) is not None
