"""Which layout of ranks a recipe can be trained on, and which it can't, said before anything begins. No torch."""

from __future__ import annotations

from fireflyer.errors import UserError
from fireflyer.parallel.layout import Layout, check_context, check_layout, layout_for
from fireflyer.parallel.stages import check_micro_batches, plan_stages
from fireflyer.train.settings import Recipe


def layout_of(recipe: Recipe, world: int) -> Layout:
    """How so many ranks share the work of a recipe. Raises UserError where they can't: which number, and what would."""
    parallel = recipe.parallel
    layout = layout_for(world, pp=parallel.pp, dp=parallel.dp, cp=parallel.cp, ep=parallel.ep, zero=parallel.zero)
    if world > 1:
        sizes = _batch_sizes(recipe)
        check_layout(layout, recipe.model, batch_sizes=sizes, micro_batch_size=parallel.micro_batch_size)
        _check_shared_out(recipe, layout)
        check_context(layout.cp, _lengths(recipe), recipe.model.num_nextn_predict_layers)
        if layout.pp > 1:
            _check_pipeline(recipe, layout)
    return layout


def _batch_sizes(recipe: Recipe) -> list[int]:
    """Those that any batch of the run is a sum of."""
    if recipe.extend is not None:
        return [phase.batch_size for phase in recipe.extend.phases]
    schedule = recipe.schedule
    ramp = [] if schedule.batch_start is None else [schedule.batch_start, schedule.batch_multiple]
    return [recipe.batch_size, *ramp]


def _check_shared_out(recipe: Recipe, layout: Layout) -> None:
    """What one process can and several can't yet."""
    if recipe.optimizer.name == "muon":
        raise UserError(
            'optimizer.name = "muon" needs whole matrices and trains in one process; --set optimizer.name=adamw'
        )
    if recipe.lora is not None:
        raise UserError("adapters ([lora]) train in one process; leave the launcher out")
    if recipe.compile:
        raise UserError("compile = true is for one process; --set compile=false")


def _check_pipeline(recipe: Recipe, layout: Layout) -> None:
    parallel = recipe.parallel
    plan_stages(recipe.model, parallel.schedule, layout.pp, parallel.stages)
    if layout.zero > 1:
        raise UserError(
            f"parallel.zero = {layout.zero} can't be combined with parallel.pp = {layout.pp}: between its micro-batches"
            " a stage keeps weights and gradients whole; --set parallel.zero=1"
        )
    if recipe.extend is not None:
        sizes = [phase.batch_size for phase in recipe.extend.phases]
    else:
        first, multiple = recipe.schedule.batch_start or recipe.batch_size, recipe.schedule.batch_multiple
        sizes = [*range(first, recipe.batch_size, multiple), recipe.batch_size]
    for size in sizes:
        rows = size // layout.dp
        check_micro_batches(parallel.schedule, layout.pp, parallel.stages, rows, parallel.micro_batch_size)


def _lengths(recipe: Recipe) -> list[int]:
    return [recipe.seq_len] if recipe.extend is None else [phase.seq_len for phase in recipe.extend.phases]
