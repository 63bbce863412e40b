"""Pipelines of two and of four gloo ranks against one process, with each schedule; the cut by itself."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fireflyer.config import load_config
from fireflyer.data.packing import Batch
from fireflyer.errors import UserError
from fireflyer.parallel.pipeline import Pipeline
from fireflyer.parallel.stage_loss import StageResult
from fireflyer.parallel.stages import PipelineSettings, check_micro_batches, cut_evenly, plan_stages
from fireflyer.train.losses import balance_loss
from tests.gloo_ranks import Ranks
from tests.parallel_case import ALPHA, MTP_WEIGHT, Case, Result, assert_same, counts, gradients, one_process


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def stage_loss(case: Case, config):
    def loss(batch, out, head_weight, part) -> StageResult:
        if head_weight is None:
            per_tok = config.num_experts_per_tok
            balance = balance_loss(out.routing, num_experts_per_tok=per_tok, rows_in_batch=case.rows, part=part)
            return StageResult(ALPHA * balance, {"balance": balance}, out.routing)
        documents = batch.document_ids_BT if case.documents else None
        terms = case.loss_of(head_weight, config, out, batch.labels_BT, documents, part)
        values = {"main": terms.main, "mtp": terms.mtp, "balance": terms.balance}
        return StageResult(terms.total(MTP_WEIGHT, ALPHA), values, out.routing)

    return loss


def piped(case: Case, schedule: str, pp: int, cp: int, steps: int = 1) -> tuple[Result, list[str]]:
    """On each rank: the sums of all stages' terms and the gradients of those that are here."""
    rank = dist.get_rank()
    mesh = torch.arange(4).view(-1, pp, cp)
    pipes = {tuple(row): dist.new_group(row) for row in mesh.transpose(1, 2).reshape(-1, pp).tolist()}
    contexts = {tuple(row): dist.new_group(row) for row in mesh.reshape(-1, cp).tolist()}
    everyone = {tuple(row): dist.new_group(row) for row in mesh.reshape(-1, pp * cp).tolist()}
    group, context, all_of_us = (
        next(group for members, group in groups.items() if rank in members) for groups in (pipes, contexts, everyone)
    )
    model, batch = case.model(), case.batch()
    config = model.config
    settings = PipelineSettings(schedule, case.documents, case.recompute)
    pipeline = Pipeline(model, settings, group, context if cp > 1 else None)
    documents = batch.documents if batch.documents is not None else torch.zeros_like(batch.ids)
    loss = stage_loss(case, config)
    found: list[StageResult] = []
    for _ in range(steps):
        model.zero_grad()
        rows = Batch(batch.ids, batch.labels, batch.positions, documents)
        seen = [sum(float(r.values["balance"]) for r in pipeline.forward_only(rows, loss))]
        found = pipeline.step(rows, case.micro_batch, loss)
        seen.append(sum(float(r.values["balance"]) for r in found))
        assert abs(seen[0] - seen[1]) < 1e-5, seen
    sums = torch.zeros(3, dtype=torch.float64)
    for result in found:
        sums += torch.stack([result.values.get(name, sums[0] * 0).double() for name in ("main", "mtp", "balance")])
    dist.all_reduce(sums, group=all_of_us)
    mine = gradients(model)
    chosen = counts(model, [routing for result in found for routing in result.routing])
    for tensor in [*mine.values(), *chosen.values()]:
        dist.all_reduce(tensor, group=context)
    return Result(sums.tolist(), mine, chosen), [name for name, _ in model.named_parameters()]


FP64 = Case(torch.float64, rows=8)
CASES = [
    ("1f1b", 2, 1, replace(FP64, micro_batch=2)),
    ("1f1b", 4, 1, replace(FP64, dtype=torch.float32)),
    ("1f1b", 2, 2, replace(FP64, recompute=True)),
    ("1f1b", 2, 1, replace(FP64, tied=True, mtp_depth=0)),
    ("interleaved", 2, 1, FP64),
    ("interleaved", 2, 2, replace(FP64, micro_batch=2)),
    ("zero-bubble", 2, 1, FP64),
    ("zero-bubble", 2, 2, replace(FP64, dtype=torch.float32, documents=False)),
    ("dualpipev", 2, 1, FP64),
    ("dualpipev", 2, 2, replace(FP64, micro_batch=2, tied=True)),
    ("dualpipev", 4, 1, replace(FP64, layers=8)),
    ("zero-bubble", 2, 1, replace(FP64, mtp_depth=1, recompute=True)),
]


@pytest.mark.parametrize(("schedule", "pp", "cp", "case"), CASES, ids=str)
def test_stages_come_to_what_one_process_comes_to(ranks, schedule, pp, cp, case):
    """Two steps on the same weights: the second is no different, whatever a schedule keeps."""
    expected = one_process(case)
    pieces = ranks.run(piped, case, schedule, pp, cp, 2)
    for first in range(0, 4, pp * cp):
        for place in range(cp):
            mine = [pieces[first + stage * cp + place] for stage in range(pp)]
            names = [name for _, names in mine for name in names]
            assert sorted(names) == sorted(expected.gradients), "each parameter lies on one stage"
            merged = Result(
                mine[0][0].terms,
                {name: gradient for found, _ in mine for name, gradient in found.gradients.items()},
                {layer: counted for found, _ in mine for layer, counted in found.counts.items()},
            )
            assert_same(merged, expected, case.dtype)


def test_cuts_are_the_best_of_all_cuts():
    """Against every way to cut."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.randint(1, 10, (7,), generator=generator).tolist()
        tail = float(torch.randint(0, 20, (), generator=generator))

        def dearest(cuts, costs=costs, tail=tail):
            pieces = [sum(costs[start:end]) for start, end in itertools.pairwise((0, *cuts, 7))]
            return max(*pieces[:-1], pieces[-1] + tail)

        best = min(dearest(cuts) for cuts in itertools.combinations_with_replacement(range(1, 8), 3) if _rises(cuts))
        found = cut_evenly(costs, tail, 4)
        assert [layer for stage in found for layer in stage] == list(range(7))
        assert dearest([stage.stop for stage in found[:-1]]) == best


def _rises(cuts):
    return all(a < b for a, b in itertools.pairwise((0, *cuts)))


def test_stages_of_the_published_model():
    """61 layers for 16 ranks with one stage each, and with DualPipeV for 8 ranks: the last stage, with head and MTP,
    has fewer; a V's first and last stages lie on one rank."""
    config = load_config("deepseek-v3")
    loop = plan_stages(config, "1f1b", 16)
    sizes = [len(stage) for stage in loop.layers]
    assert sum(sizes) == 61
    assert sizes[-1] < max(sizes)
    assert loop.ranks == tuple(range(16))
    fold = plan_stages(config, "dualpipev", 8)
    assert fold.ranks == (*range(8), *reversed(range(8)))
    assert fold.stages_of(0) == [0, 15]
    assert plan_stages(config, "interleaved", 8).ranks == (*range(8), *range(8))


@pytest.mark.parametrize(
    ("schedule", "pp", "stages", "said"),
    [
        ("1f1b", 8, 0, "pp = 5 would do"),
        ("dualpipev", 4, 0, "pp = 2 would do"),
        ("dualpipev", 2, 3, "give 2"),
        ("interleaved", 2, 1, "give 2"),
        ("1f1b", 2, 2, "give 1"),
    ],
)
def test_stages_that_cannot_be_are_refused_with_what_can(schedule, pp, stages, said):
    with pytest.raises(UserError, match=said):
        plan_stages(Case(torch.float32).model().config, schedule, pp, stages)


@pytest.mark.parametrize(
    ("schedule", "pp", "rows", "micro", "said"),
    [
        ("1f1b", 4, 8, 0, "needs 4 micro-batches at least, .* make 1; set parallel.micro_batch_size = 2"),
        ("interleaved", 2, 6, 2, "a multiple of 2, .* make 3; set parallel.micro_batch_size = 3"),
        ("dualpipev", 2, 8, 4, "needs 4 .* make 2; set parallel.micro_batch_size = 2"),
        ("dualpipev", 4, 4, 1, "set batch_size to 8 a rank"),
    ],
)
def test_too_few_micro_batches_are_refused_with_what_would_do(schedule, pp, rows, micro, said):
    with pytest.raises(UserError, match=said):
        check_micro_batches(schedule, pp, 0, rows, micro)
