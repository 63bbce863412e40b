"""Schedules: table 2 of the V3 report by hand, and a discrete-event simulation against the formulas."""

import pytest
from pipeline_simulator import dualpipe, dualpipev, interleaved, one_f_one_b, simulate, zero_bubble

from fireflyer.cost.pipeline import ChunkTimes, Pipeline, complaint

HAND = ChunkTimes(forward=2.0, backward=4.0, weights=1.5, overlapped=5.0)
# (PP-1)(F+B), (PP-1)(F+B-2W), (PP/2-1)(F&B+B-3W), worked out on paper with F 2, B 4, W 1.5, F&B 5.
BUBBLES = {2: (6, 3, 0), 4: (18, 9, 4.5), 6: (30, 15, 9), 8: (42, 21, 13.5), 10: (54, 27, 18), 16: (90, 45, 31.5)}


@pytest.mark.parametrize("ranks", BUBBLES)
def test_table_2_of_the_report(ranks: int):
    micro_batches = 4 * ranks
    pipelines = [Pipeline(name, ranks, micro_batches) for name in ("1f1b", "zero-bubble")]
    pipelines.append(Pipeline("dualpipe", ranks, micro_batches, 2))
    assert tuple(pipeline.bubble(HAND) for pipeline in pipelines) == BUBBLES[ranks]
    assert [pipeline.copies for pipeline in pipelines] == [1, 1, 2]
    assert [pipeline.activations() for pipeline in pipelines] == [ranks, ranks, ranks + 1]
    assert [pipeline.stages for pipeline in pipelines] == [ranks] * 3


@pytest.mark.parametrize("stages", BUBBLES)
def test_dualpipev_is_dualpipe_on_half_the_devices(stages: int):
    pipeline = Pipeline("dualpipev", stages // 2, 4 * stages, 2)
    assert pipeline.bubble(HAND) == BUBBLES[stages][2]
    assert (pipeline.stages, pipeline.activations(), pipeline.copies) == (stages, stages + 1, 1)


EXACT = [ChunkTimes(1, 2, 1, 3), ChunkTimes(1, 2, 1, 2.25), ChunkTimes(3, 6, 3, 7)]
CASES = [(2, 4), (2, 9), (4, 8), (4, 20), (8, 16), (8, 24), (16, 32)]


@pytest.mark.parametrize(("ranks", "micro_batches"), CASES)
@pytest.mark.parametrize("times", [*EXACT, ChunkTimes(1, 2.5, 0.75, 3)], ids=str)
def test_1f1b_and_zero_bubble_run_as_the_formulas_say(ranks: int, micro_batches: int, times: ChunkTimes):
    for name, order in (("1f1b", one_f_one_b), ("zero-bubble", zero_bubble)):
        pipeline = Pipeline(name, ranks, micro_batches)
        run = simulate(order(ranks, micro_batches), ranks, times)
        assert run.seconds == pytest.approx(pipeline.step(times), rel=1e-12)
        assert run.seconds - run.busy[0] == pytest.approx(pipeline.bubble(times), abs=1e-9)
        assert run.held == [pipeline.activations(rank) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "groups", "chunks"), [(2, 3, 2), (4, 2, 2), (4, 5, 4), (8, 2, 3)])
def test_interleaving_runs_as_the_formula_says(ranks: int, groups: int, chunks: int):
    times = ChunkTimes(1, 2.5, 0.75, 0)
    pipeline = Pipeline("interleaved", ranks, ranks * groups, chunks)
    run = simulate(interleaved(ranks, ranks * groups, chunks), pipeline.stages, times)
    assert run.seconds == pytest.approx(pipeline.step(times), rel=1e-12)
    assert run.seconds - run.busy[0] == pytest.approx((ranks - 1) * 3.5)
    assert run.held == [pipeline.activations(rank) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (2, 10), (4, 8), (4, 20), (8, 20), (16, 32), (16, 40)])
@pytest.mark.parametrize("times", EXACT, ids=str)
def test_both_dualpipes_run_as_the_formula_says(ranks: int, micro_batches: int, times: ChunkTimes):
    """Exact where F = W, which the formula takes for granted."""
    _check(Pipeline("dualpipe", ranks, micro_batches, 2), dualpipe(ranks, micro_batches), times, 1e-12)
    _check(Pipeline("dualpipev", ranks // 2, micro_batches, 2), dualpipev(ranks // 2, micro_batches), times, 1e-12)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 20), (8, 40), (16, 120)])
def test_dualpipe_with_v3s_chunk_times(ranks: int, micro_batches: int):
    """In milliseconds: a lone forward shows its all-to-all, so F is far from W; the formula stays within 1.5%."""
    times = ChunkTimes(63, 114, 28, 131)
    _check(Pipeline("dualpipe", ranks, micro_batches, 2), dualpipe(ranks, micro_batches), times, 0.015)
    _check(Pipeline("dualpipev", ranks // 2, micro_batches, 2), dualpipev(ranks // 2, micro_batches), times, 0.015)


def _check(pipeline: Pipeline, orders, times: ChunkTimes, tolerance: float) -> None:
    run = simulate(orders, pipeline.stages, times)
    assert run.seconds == pytest.approx(pipeline.step(times), rel=tolerance)
    middle = len(orders) // 2 if pipeline.schedule == "dualpipe" else len(orders) - 1
    if tolerance < 1e-6:
        assert run.seconds - run.busy[middle] == pytest.approx(pipeline.bubble(times), abs=1e-9)
    assert set(run.held) == {pipeline.activations()}


def test_what_a_schedule_cannot_run_is_said_with_what_would():
    assert "even pp, not 3" in (complaint(Pipeline("dualpipe", 3, 12, 2)) or "")
    assert "needs 8 micro-batches for 4 ranks, and there are 6" in (complaint(Pipeline("dualpipev", 4, 6, 2)) or "")
    assert "divisible by pp 4, and there are 6" in (complaint(Pipeline("interleaved", 4, 6, 2)) or "")
    assert complaint(Pipeline("dualpipe", 4, 8, 2)) is None
    assert Pipeline("1f1b", 1, 8).bubble(HAND) == 0
