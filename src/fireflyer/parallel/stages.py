"""Where a pipeline cuts the decoder: arithmetic, no torch.

Stage 0 has the embedding; the last has the norm, the head and the MTP modules (which share head and embedding), and
fewer layers for that. A rank has one stage or several: in a loop (rank r: r, r + pp, ...), or with DualPipeV the two
legs of a V (r and 2·pp - 1 - r), so that the first and the last are neighbours (report 3.2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import count_parameters
from fireflyer.errors import UserError

Schedule = Literal["1f1b", "interleaved", "zero-bubble", "dualpipev"]

DEFAULT_STAGES: dict[Schedule, int] = {"1f1b": 1, "interleaved": 2, "zero-bubble": 2, "dualpipev": 2}
"""Stages a rank where the recipe gives none."""


@dataclass(frozen=True)
class PipelineSettings:
    """schedule, stages: as `plan_stages` takes them. mask_documents, recompute: as in training. around: entered for
    each forward pass, say autocast."""

    schedule: Schedule
    mask_documents: bool
    recompute: bool
    stages: int = 0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class StagePlan:
    """layers: of each stage; ranks: the rank that has it."""

    schedule: Schedule
    layers: tuple[range, ...]
    ranks: tuple[int, ...]

    def stages_of(self, rank: int) -> list[int]:
        """Rising."""
        return [stage for stage, holder in enumerate(self.ranks) if holder == rank]


def plan_stages(config: ModelConfig, schedule: Schedule, pp: int, stages: int = 0) -> StagePlan:
    """Which layers lie where. stages: of a rank, 0 for the schedule's own number. Raises UserError: what would do."""
    each = stages or DEFAULT_STAGES[schedule]
    if schedule == "1f1b" and each != 1:
        raise UserError(f'parallel.stages = {each}: schedule "1f1b" has one stage a rank; give 1, or "interleaved"')
    if schedule == "dualpipev" and each != 2:
        raise UserError(f'parallel.stages = {each}: schedule "dualpipev" has two stages a rank; give 2')
    if schedule == "interleaved" and each < 2:
        raise UserError(f'parallel.stages = {each}: "interleaved" needs 2 stages a rank or more; give 2, or "1f1b"')
    total, layers = pp * each, config.num_hidden_layers
    if total > layers + 1:
        would = f"pp = {(layers + 1) // each} would do" if layers + 1 >= 2 * each else 'schedule "1f1b" would do'
        raise UserError(
            f"parallel.pp = {pp} with {each} stages a rank cuts {layers} layers into {total} stages; {would}"
        )
    ranks = [stage % pp for stage in range(total)]
    if schedule == "dualpipev":
        ranks = [min(stage, total - 1 - stage) for stage in range(total)]
    return StagePlan(schedule, tuple(cut_evenly(*_costs(config), total)), tuple(ranks))


def check_micro_batches(schedule: Schedule, pp: int, stages: int, rows: int, micro_batch_size: int) -> None:
    """Raises UserError where a rank's sequences don't make micro-batches that the schedule can run: what would do.

    stages: of a rank, 0 for the schedule's own number. rows: sequences of a rank in a step.
    """
    count = rows // (micro_batch_size or rows)
    # What torch's schedules ask for: enough to fill the pipeline once, and whole rounds.
    least = pp * (stages or DEFAULT_STAGES[schedule]) if schedule == "dualpipev" else pp
    whole_rounds = schedule in ("interleaved", "zero-bubble")
    if count >= least and not (whole_rounds and count % pp):
        return
    fitting = [n for n in range(least, rows + 1) if rows % n == 0 and not (whole_rounds and n % pp)]
    need = f"{least} micro-batches at least" + (f" and a multiple of {pp}" if whole_rounds else "")
    would = f"set parallel.micro_batch_size = {rows // fitting[0]}" if fitting else f"set batch_size to {least} a rank"
    raise UserError(
        f'schedule "{schedule}" on parallel.pp = {pp} needs {need}, and the {rows} sequences of a rank make {count}; '
        + would
    )


def _costs(config: ModelConfig) -> tuple[list[float], float]:
    """Of each layer, and of what follows the last: the parameters that take part for a token."""
    counts = count_parameters(config)
    sparse = counts.router + counts.shared_experts + config.num_experts_per_tok * counts.routed_expert
    layers = [
        float(counts.attention_layer + (sparse if config.is_moe(index) else counts.dense_ffn_layer))
        for index in range(config.num_hidden_layers)
    ]
    return layers, float(counts.embedding + counts.mtp_active)


def cut_evenly(costs: list[float], tail: float, stages: int) -> list[range]:
    """Neighbouring layers for each stage so that the dearest stage costs least; `tail` is the last one's besides.

    Every stage but the last has a layer at least. Of equal cuts the one whose early stages are the longer.
    """
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)
    count = len(costs)
    # best[layers]: the dearest of the stages so far that hold these first layers, and where each of them ends.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(stages):
        last = stage == stages - 1
        found: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (dearest, ends) in best.items():
            for end in [count] if last else range(start + 1, count + 1):
                cost = max(dearest, before[end] - before[start] + (tail if last else 0.0))
                if end not in found or cost < found[end][0]:
                    found[end] = (cost, (*ends, end))
        best = found
    ends = best[count][1]
    return [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]
