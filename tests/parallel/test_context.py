"""Context parallelism on two and on four gloo ranks against one process; the cut of a sequence by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from fireflyer.errors import UserError
from fireflyer.parallel.context import Sequences, head_tail_places, sequence_part
from fireflyer.parallel.layout import check_context
from tests.gloo_ranks import Ranks
from tests.parallel_case import ALPHA, MTP_WEIGHT, Case, Result, assert_same, counts, gradients, one_process


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def shared_out(case: Case, cp: int) -> Result:
    """On each rank: its part of the sequences, then the sums over the cp ranks that share them."""
    groups = [dist.new_group(list(range(first, first + cp))) for first in range(0, 4, cp)]
    group = groups[dist.get_rank() // cp]
    model, batch = case.model(), case.batch()
    part = sequence_part(case.tokens, group, "cpu")
    sequences = Sequences(batch.ids, batch.positions, batch.documents, part)
    out = model.trunk_of(sequences, recompute=case.recompute)
    terms = case.loss(model, out, batch, part=part)
    terms.total(MTP_WEIGHT, ALPHA).backward()
    sums = torch.stack([terms.main, terms.mtp, terms.balance]).detach()
    found = gradients(model)
    chosen = counts(model, out.routing)
    for tensor in [sums, *found.values(), *chosen.values()]:
        dist.all_reduce(tensor, group=group)
    return Result(sums.tolist(), found, chosen)


FP64 = Case(torch.float64)
CASES = [
    FP64,
    replace(FP64, dtype=torch.float32),
    replace(FP64, documents=False, recompute=True),
    replace(FP64, mtp_depth=0, tokens=8),
    replace(FP64, tied=True, mtp_depth=1),
]


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_of_sequences_come_to_what_whole_ones_come_to(ranks, case, cp):
    expected = one_process(case)
    assert expected.terms[2] > 0
    for found in ranks.run(shared_out, case, cp):
        assert_same(found, expected, case.dtype)


def test_every_rank_reads_as_much_as_any_other():
    """A causal query at i reads i + 1 keys; head and tail pieces make the sums equal."""
    places = head_tail_places(48, 4)
    assert sorted(places.flatten().tolist()) == list(range(48))
    assert len({int((row + 1).sum()) for row in places}) == 1
    assert all(row.tolist() == sorted(row.tolist()) for row in places)


@pytest.mark.parametrize(
    ("cp", "seq_len", "said"),
    [(2, 30, "28 or 32 would"), (4, 6, "8 would"), (4, 8, "seq_len = 24 would do")],
)
def test_lengths_that_cannot_be_cut_are_refused_with_what_can(cp, seq_len, said):
    check_context(1, [seq_len], mtp_depth=2)
    with pytest.raises(UserError, match=f"parallel.cp = {cp} .*{said}"):
        check_context(cp, [seq_len], mtp_depth=2)
