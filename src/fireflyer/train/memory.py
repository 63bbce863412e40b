"""What a recipe's run takes of memory on one process, and whether this machine has that much free. No torch.

In: a Recipe. Out: bytes by what they are for (cost/training_memory.py); a refusal before the run where they can't fit.
"""

from __future__ import annotations

from fireflyer.config.sizes import show_bytes
from fireflyer.cost.training_memory import TrainingMemory, training_memory
from fireflyer.errors import UserError
from fireflyer.train.settings import Recipe


def run_memory(recipe: Recipe) -> TrainingMemory:
    """Of the largest batch, on one process. FP8's narrower activations are counted as bf16's: an upper bound."""
    phases = [recipe] if recipe.extend is None else recipe.extend.phases
    return max((_memory(recipe, phase.batch_size, phase.seq_len) for phase in phases), key=lambda found: found.total)


def _memory(recipe: Recipe, batch_size: int, seq_len: int) -> TrainingMemory:
    parallel = recipe.parallel
    rows = parallel.micro_batch_size or batch_size
    narrow = recipe.dtype == "bf16" or recipe.precision.matmul == "fp8"
    return training_memory(
        recipe.model,
        rows=rows,
        seq_len=seq_len,
        micro_batches=-(-batch_size // rows),
        recompute=parallel.recompute,
        average=bool(recipe.ema.decay),
        bytes_per_operand=2 if narrow else 4,
    )


def check_memory(recipe: Recipe, free_bytes: int) -> None:
    """Raises UserError where the run would take more than is free, with the micro-batch that fits, if one does."""
    needed = run_memory(recipe)
    if needed.total <= free_bytes:
        return
    text = f"training takes about {show_bytes(needed.total)} of memory and {show_bytes(free_bytes)} are free: "
    sizes = [recipe.batch_size] if recipe.extend is None else [phase.batch_size for phase in recipe.extend.phases]
    for rows in range((recipe.parallel.micro_batch_size or min(sizes)) - 1, 0, -1):
        if any(size % rows for size in sizes):
            continue
        parallel = recipe.parallel.model_copy(update={"micro_batch_size": rows})
        if run_memory(recipe.model_copy(update={"parallel": parallel})).total <= free_bytes:
            raise UserError(f"{text}--set parallel.micro_batch_size={rows} fits, with the same result")
    hint = "" if recipe.parallel.recompute else ", --set parallel.recompute=true"
    raise UserError(f"{text}give a smaller model or seq_len{hint}, or another machine")
