"""What the recipe prescribes at each point of a run: learning rate, batch, MTP weight, bias speed. Pure, no torch.

In: a Recipe, the steps done and the tokens seen before the step in question. Out: numbers; and the whole schedule as
rows, each boundary with its token count and step. V3 report, section 4.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction

from fireflyer.train.quantities import resolve_boundary
from fireflyer.train.settings import Recipe


def learning_rate(recipe: Recipe, step: int, tokens: int) -> float:
    """The rate of the step after `step` steps and `tokens` tokens.

    By tokens: `lr`, then half a cosine down to `cosine_lr`, then the constants of `final`, of which the last holds on.
    The warm-up multiplies that by (step + 1) / warmup_steps, so that no step is wasted at rate 0.
    """
    warmup = warmup_steps(recipe)
    share = (step + 1) / warmup if step + 1 < warmup else 1.0
    return share * _rate_by_tokens(recipe, tokens)


def warmup_steps(recipe: Recipe) -> int:
    """Steps of the warm-up; a share of the run is rounded down."""
    warmup = recipe.schedule.warmup_steps
    return int(Fraction(warmup[:-1]) * run_steps(recipe) / 100) if isinstance(warmup, str) else warmup


def batch_size_at(recipe: Recipe, tokens: int) -> int:
    """Sequences of the step after `tokens` tokens; see ramp.py for the rounding."""
    return recipe.batch_ramp.batch_size_at(tokens)


def mtp_weight(recipe: Recipe, tokens: int) -> float:
    """λ of the MTP loss for the step after `tokens` tokens."""
    late_from = recipe.mtp.late_from
    return recipe.mtp.weight if late_from is None or tokens < _at(recipe, late_from) else recipe.mtp.late_weight


def bias_speed(recipe: Recipe, tokens: int) -> float:
    """γ of the gate bias for the step after `tokens` tokens."""
    until = recipe.balance.bias_until
    return recipe.balance.bias_speed if until is None or tokens < _at(recipe, until) else 0.0


def run_steps(recipe: Recipe) -> int:
    """Steps of the run. Its length must not be in epochs any more."""
    steps = recipe.total_steps
    assert steps is not None, "the data's tokens are not known yet: with_epoch_tokens comes first"
    return steps


def run_tokens(recipe: Recipe) -> int:
    """Tokens that the run asks for; the last step may go beyond."""
    tokens = recipe.total_tokens
    assert tokens is not None, "the data's tokens are not known yet: with_epoch_tokens comes first"
    return tokens


@dataclass(frozen=True)
class ScheduleRow:
    """From `tokens` on (first met by the step after `step` steps) these hold; the last row is the end of the run."""

    step: int
    tokens: int
    lr: float
    batch_size: int
    tokens_per_step: int
    mtp_weight: float
    bias_speed: float
    events: tuple[str, ...]


def schedule_table(recipe: Recipe) -> list[ScheduleRow]:
    """The run from its start to its end, a row wherever something changes; boundaries beyond the end have none."""
    total, ramp = run_tokens(recipe), recipe.batch_ramp
    events: dict[int, list[str]] = {0: ["start"]}
    for tokens, event in _boundaries(recipe):
        if 0 < tokens < total:
            events.setdefault(tokens, []).append(event)
    rows = [_row(recipe, ramp.steps_to(tokens), tokens, tuple(events[tokens])) for tokens in sorted(events)]
    last_step = run_steps(recipe) - 1
    last = _row(recipe, last_step, ramp.tokens_after(last_step), ("end",))
    return [*rows, replace(last, step=last_step + 1, tokens=total)]


def _rate_by_tokens(recipe: Recipe, tokens: int) -> float:
    schedule = recipe.schedule
    start, end = _at(recipe, schedule.constant_until), _at(recipe, schedule.cosine_until)
    if tokens < start:
        return schedule.lr
    low = schedule.lr / 10 if schedule.cosine_lr is None else schedule.cosine_lr
    if tokens < end:
        return low + (schedule.lr - low) * (1 + math.cos(math.pi * (tokens - start) / (end - start))) / 2
    for phase in schedule.final:
        if tokens < _at(recipe, phase.until):
            return phase.lr
    return schedule.final[-1].lr if schedule.final else low


def _at(recipe: Recipe, boundary: int | str) -> int:
    return boundary if isinstance(boundary, int) else resolve_boundary(boundary, run_tokens(recipe))


def _boundaries(recipe: Recipe) -> list[tuple[int, str]]:
    schedule = recipe.schedule
    found = [(recipe.batch_ramp.tokens_after(warmup_steps(recipe)), "warm-up over")]
    if schedule.batch_ramp_tokens is not None:
        found.append((schedule.batch_ramp_tokens, "batch ramp over"))
    if recipe.extend is not None:
        starts = [(recipe.batch_ramp.tokens_after(steps), seq_len) for steps, seq_len in recipe.extend.starts]
        found += [(tokens, f"sequences of {seq_len:,} tokens") for tokens, seq_len in starts]
    found.append((_at(recipe, schedule.constant_until), "cosine begins"))
    found.append((_at(recipe, schedule.cosine_until), "cosine over"))
    found += [(_at(recipe, phase.until), "next constant rate") for phase in schedule.final[:-1]]
    if recipe.mtp.late_from is not None:
        found.append((_at(recipe, recipe.mtp.late_from), "MTP weight changes"))
    if recipe.balance.bias_until is not None:
        found.append((_at(recipe, recipe.balance.bias_until), "gate bias stands still"))
    return found


def _row(recipe: Recipe, step: int, tokens: int, events: tuple[str, ...]) -> ScheduleRow:
    batch_size = batch_size_at(recipe, tokens)
    return ScheduleRow(
        step=step,
        tokens=tokens,
        lr=learning_rate(recipe, step, tokens),
        batch_size=batch_size,
        tokens_per_step=batch_size * recipe.batch_ramp.seq_len_at(tokens),
        mtp_weight=mtp_weight(recipe, tokens),
        bias_speed=bias_speed(recipe, tokens),
        events=events,
    )
