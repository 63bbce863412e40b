"""A layout asked for by hand that can't be, and a plan that can't fit: what is wrong, and what would do. No torch."""

from __future__ import annotations

from dataclasses import fields, replace

from fireflyer.cost.judge import TrainingPlan
from fireflyer.cost.layouts import Job, Wanted, context_choices, divisors, schedules
from fireflyer.cost.pipeline import SCHEDULES, Pipeline, complaint
from fireflyer.cost.plan import leanest, search
from fireflyer.errors import UserError

MOST_GPUS = 16_384


def check_wanted(job: Job, wanted: Wanted) -> None:
    """Raises UserError for the first number that can't be part of a layout, with the nearest that can."""
    count, experts = job.count, job.config.n_routed_experts
    for name in ("pp", "cp", "dp"):
        _must_divide(name, getattr(wanted, name), f"--count {count:,}", count)
    pp, cp, dp = wanted.pp or 1, wanted.cp or 1, wanted.dp or 1
    asked = " ".join(f"--{name} {getattr(wanted, name)}" for name in ("pp", "dp", "cp") if getattr(wanted, name))
    if count % (pp * cp * dp):
        raise UserError(f"{asked}: {pp * cp * dp:,} ranks don't divide --count {count:,}; leave one of them out")
    context_left = None not in (wanted.pp, wanted.dp) and wanted.cp is None
    if context_left and count // (pp * dp) not in context_choices(job.seq_len):
        good = count // pp
        raise UserError(f"{asked} is {pp * dp:,} of --count {count:,} GPUs; give --dp {good:,} or --count {pp * dp:,}")
    if None not in (wanted.pp, wanted.dp, wanted.cp) and pp * cp * dp != count:
        good = count // (pp * cp)
        raise UserError(f"{asked} is {pp * cp * dp:,} of --count {count:,} GPUs; give --dp {good:,}")
    if pp > job.config.num_hidden_layers:
        raise UserError(
            f"--pp {pp} is above the {job.config.num_hidden_layers} layers;"
            f" give {max(d for d in divisors(count) if d <= job.config.num_hidden_layers)} or less"
        )
    if wanted.pp and not schedules(pp, wanted.schedule):
        others = sorted({name for name, _ in schedules(pp, None)}, key=SCHEDULES.index)
        raise UserError(f"--schedule {wanted.schedule} needs a pipeline, and pp is {pp}; give {' or '.join(others)}")
    _must_divide("cp", wanted.cp, f"--seq-len {job.seq_len:,}", job.seq_len)
    if wanted.ep is not None and wanted.ep > 1 and not experts:
        raise UserError(f"--ep {wanted.ep}: the model has no routed experts; leave it out")
    if experts:
        _must_divide("ep", wanted.ep, f"{experts} routed experts", experts)
    data_ranks = count // pp if wanted.pp else dp * cp if wanted.dp and wanted.cp else None
    if data_ranks:
        _must_divide("ep", wanted.ep, f"dp x cp = {data_ranks:,}", data_ranks)
    if wanted.dp or (wanted.pp and job.seq_len < 32768):
        _check_batch(job, wanted, wanted.dp or count // (pp * cp))


def _check_batch(job: Job, wanted: Wanted, dp: int) -> None:
    batch = job.global_batch
    if batch % dp:
        lower, upper = batch // dp * dp, (batch // dp + 1) * dp
        would = f"{upper:,}" if not lower else f"{lower:,} or {upper:,}"
        raise UserError(f"--global-batch {batch:,} doesn't divide among dp {dp:,}; give {would}")
    if wanted.micro_batch is not None:
        _must_divide("micro-batch", wanted.micro_batch, f"the {batch // dp:,} sequences of a rank", batch // dp)
    if wanted.schedule is not None and wanted.pp is not None:
        per_rank = batch // dp // (wanted.micro_batch or 1)
        tried = [
            complaint(Pipeline(name, wanted.pp, per_rank, chunks))
            for name, chunks in schedules(wanted.pp, wanted.schedule)
        ]
        if all(tried):
            raise UserError(f"--schedule {tried[0]}; raise --global-batch or lower --pp")


def _must_divide(name: str, value: int | None, what: str, number: int) -> None:
    if value is None or number % value == 0:
        return
    near = divisors(number)
    lower = max((d for d in near if d < value), default=None)
    upper = min((d for d in near if d > value), default=None)
    would = " or ".join(str(d) for d in (lower, upper) if d is not None)
    raise UserError(f"--{name} {value} doesn't divide {what}; give {would}")


def fastest(job: Job, wanted: Wanted, name: str) -> TrainingPlan:
    """The fastest layout that fits. Raises UserError with the nearest that does where none of the wanted ones does."""
    check_wanted(job, wanted)
    found = search(job, wanted)
    if found is not None:
        return found
    least = leanest(job, wanted)
    lead = f"{name} in {job.precision} doesn't fit on {job.count:,} {job.gpu.name}"
    if wanted != Wanted():
        lead += " in this layout"
    if least is None:
        raise UserError(_undivided(job, wanted))
    needs = (
        f"{lead}: it needs at least {least.memory.total / 1e9:,.1f} GB a rank ({describe(least)}), and of"
        f" {job.gpu.memory_gb:g} GB {job.memory_bytes / 1e9:.1f} can be used"
    )
    raise UserError(needs + (_nearest_layout(job, wanted) or _larger(job)))


def _undivided(job: Job, wanted: Wanted) -> str:
    """No layout takes the batch apart: the batches nearest to it that some would."""
    count, layers = job.count, job.config.num_hidden_layers
    pipelines = [pp for pp in divisors(count) if pp <= layers and wanted.pp in (None, pp)]
    least = min(wanted.dp or count // (pp * max(context_choices(job.seq_len))) or 1 for pp in pipelines)
    lower = job.global_batch // least * least
    would = f"{lower + least:,}" if not lower else f"{lower:,} or {lower + least:,}"
    return (
        f"--global-batch {job.global_batch:,} sequences can't be shared out on {count:,} GPUs with at most {layers}"
        f" pipeline ranks; give {would}, or another --count"
    )


def _nearest_layout(job: Job, wanted: Wanted) -> str | None:
    """The layout on as many GPUs that fits and keeps most of what was asked for."""
    asked = [field.name for field in fields(Wanted) if getattr(wanted, field.name) is not None]
    if not asked:
        return None
    freed = [search(job, replace(wanted, **{name: None})) for name in asked]
    fitting = [plan for plan in [*freed, search(job)] if plan is not None]
    if not fitting:
        return None
    kept = {id(plan): sum(getattr(plan.layout, name) == getattr(wanted, name) for name in asked) for plan in fitting}
    nearest = max(fitting, key=lambda plan: (kept[id(plan)], plan.tokens_per_s))
    return f"; the nearest that fits is {describe(nearest)}"


def _larger(job: Job) -> str:
    """The smallest number of GPUs, of this one's doubles, on which some layout fits."""
    count = job.count
    while count < MOST_GPUS:
        count = min(2 * count, MOST_GPUS)
        found = search(replace(job, count=count))
        if found is not None:
            return f"; the nearest that fits is --count {count} with {describe(found)}"
    return f"; it doesn't on {MOST_GPUS:,} either: lower --seq-len or take a card with more memory"


def describe(plan: TrainingPlan) -> str:
    """A layout in the words of the options."""
    layout = plan.layout
    context = f"cp {layout.cp}, " if layout.cp > 1 else ""
    stages = f" of {layout.chunks} stages a rank" if layout.schedule == "interleaved" else ""
    return (
        f"pp {layout.pp}, dp {layout.dp}, {context}ep {layout.ep}, zero {layout.zero},"
        f" micro-batch {layout.micro_batch}, {layout.schedule}{stages}, recompute {layout.recompute}"
    )
