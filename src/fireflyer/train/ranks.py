"""The ranks of a run: met, their layout found, and whether they agree on what they train."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fireflyer.parallel.ranks import Ranks, agree, open_ranks
from fireflyer.parallel.started import world_size
from fireflyer.train.layers import leaves
from fireflyer.train.layout import layout_of
from fireflyer.train.recipe import as_tables
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import Inputs, RunState, chosen_device, recipe_sha256


def join_ranks(recipe: Recipe) -> tuple[Recipe, Ranks]:
    """The layout of the ranks that were started, one or more, in the recipe too. Raises UserError, on all of them."""
    world = world_size()
    if world > 1:
        agree({f"value of {key}": str(value) for key, value in leaves(as_tables(recipe))})
    layout, parallel = layout_of(recipe, world), recipe.parallel
    ranks = open_ranks(layout, chosen_device(recipe))
    return recipe.model_copy(update={"parallel": parallel.model_copy(update={"dp": layout.dp})}), ranks


def check_agreement(inputs: Inputs, state: RunState, run_dir: Path) -> None:
    """Whether all ranks go on from the same step of the same run on the same data. Raises UserError on all."""
    data = json.dumps(state.objective.state_dict(), sort_keys=True)
    state.ranks.same(
        {
            "data or tokenizer": hashlib.sha256((data + recipe_sha256(inputs.recipe)).encode()).hexdigest(),
            f"checkpoint in {run_dir} (a folder that all ranks must share)": str(state.step),
        }
    )
