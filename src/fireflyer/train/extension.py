"""Context extension as settings (report 4.3): YaRN and its phases, the lengths and batches that follow. No torch.

In: the settings of a command, a checkpoint's model among them. Out: what they come to: the model with YaRN, the longest
sequence, the steps of all phases; and `LengthPhases`, which says what each step takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fireflyer.config import RopeScaling
from fireflyer.errors import UserError
from fireflyer.train.layers import Layer, leaves, merged_values, origin_of
from fireflyer.train.tables import Table

Count = Annotated[int, Field(ge=1)]


class ExtendPhase(Table):
    """Steps with sequences of one length. sources: its text, where that isn't data.sources (by default the last's)."""

    seq_len: Annotated[int, Field(ge=2)]
    batch_size: Count
    steps: Count
    sources: list[str] | None = None


class ExtendSettings(Table):
    """[extend]: YaRN by `factor` from the `original` tokens that the model knows, trained in phases.

    original: None is the checkpoint's max_position_embeddings; what it was trained at, where that is less.
    """

    factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 40.0
    original: Count | None = None
    phases: Annotated[list[ExtendPhase], Field(min_length=1)]

    @property
    def starts(self) -> list[tuple[int, int]]:
        """(steps before it, its length) of each phase."""
        steps = accumulate((phase.steps for phase in self.phases), initial=0)
        return list(zip(steps, (phase.seq_len for phase in self.phases), strict=False))


@dataclass(frozen=True)
class LengthPhases:
    """What `ramp.BatchRamp` says of one length, of several after one another."""

    phases: Sequence[ExtendPhase]

    @property
    def mean_seq_len(self) -> float:
        """Of a token."""
        tokens = [_tokens(phase) for phase in self.phases]
        return sum(phase.seq_len * n for phase, n in zip(self.phases, tokens, strict=True)) / sum(tokens)

    def batch_size_at(self, tokens: int) -> int:
        """Sequences of the step that begins when `tokens` have been seen."""
        return self._at(tokens).batch_size

    def seq_len_at(self, tokens: int) -> int:
        """Their length."""
        return self._at(tokens).seq_len

    def tokens_after(self, steps: int) -> int:
        """Tokens seen when so many steps are done."""
        seen = 0
        for phase in self.phases:
            taken = min(steps, phase.steps) if phase is not self.phases[-1] else steps
            seen += taken * phase.batch_size * phase.seq_len
            steps -= taken
        return seen

    def steps_to(self, tokens: int) -> int:
        """The fewest steps after which `tokens` or more have been seen."""
        steps = 0
        for phase in self.phases:
            per_step = phase.batch_size * phase.seq_len
            needed = -(-tokens // per_step)
            if needed <= phase.steps or phase is self.phases[-1]:
                return steps + needed
            tokens, steps = tokens - phase.steps * per_step, steps + phase.steps
        return steps

    def _at(self, tokens: int) -> ExtendPhase:
        for phase in self.phases:
            if tokens < _tokens(phase):
                return phase
            tokens -= _tokens(phase)
        return self.phases[-1]


def extension_layer(layers: list[Layer]) -> Layer | None:
    """What [extend] decides of a recipe, None where there is none. Raises UserError where it can't be."""
    values = merged_values(layers)
    model = values.get("model")
    if "extend" not in values or not isinstance(model, dict):
        return None
    try:
        extend = ExtendSettings.model_validate(values["extend"])
    except ValidationError:
        return None  # the recipe's own check says what is wrong
    origin = origin_of("extend.phases", layers)
    original = _original(extend, model, layers)
    _check_lengths(extend, original, origin)
    first, last = extend.phases[0], extend.phases[-1]
    scaling = RopeScaling(factor=extend.factor, original_max_position_embeddings=original, mscale_all_dim=1.0)
    decided: dict[str, Any] = {
        "seq_len": last.seq_len,
        "batch_size": first.batch_size,
        "steps": sum(phase.steps for phase in extend.phases),
        "extend": {"original": original},
        "model": {
            "rope_scaling": {"type": "yarn", **scaling.model_dump()},
            "max_position_embeddings": int(original * extend.factor),
        },
    }
    if last.sources and not values.get("data", {}).get("sources"):
        decided["data"] = {"sources": last.sources}
    _check_given(dict(leaves(decided)), layers)
    return Layer(decided, "[extend]", {})


def _original(extend: ExtendSettings, model: dict[str, Any], layers: list[Layer]) -> int:
    """Tokens that the model knows. Raises UserError for one that YaRN has stretched already."""
    where = next((layer.label for layer in layers if layer.whole_model), "the recipe")
    scaling = model.get("rope_scaling")
    if scaling:
        raise UserError(
            f"{where}: it has YaRN already (factor {scaling.get('factor')} from"
            f" {scaling.get('original_max_position_embeddings')} tokens); extension begins from a model without. Within"
            f" its {model.get('max_position_embeddings')} tokens fireflyer pretrain --from trains it at any length"
        )
    known = model["max_position_embeddings"]
    if extend.original is not None and extend.original > known:
        raise UserError(
            f"extend.original = {extend.original} is above the {known} positions of {where}; give at most that"
        )
    return extend.original or known


def _check_lengths(extend: ExtendSettings, original: int, origin: str) -> None:
    before = original
    for number, phase in enumerate(extend.phases):
        name = f"extend.phases[{number}].seq_len = {phase.seq_len}"
        if phase.seq_len <= before:
            what = "the phase before" if number else "the model without extension"
            raise UserError(f"{name} isn't above the {before} tokens of {what}; give a longer one ({origin})")
        if phase.seq_len > original * extend.factor:
            raise UserError(
                f"{name} is beyond extend.factor = {extend.factor:g} times the {original} tokens that the model knows;"
                f" raise the factor to {-(-phase.seq_len // original)} or lower the length ({origin})"
            )
        before = phase.seq_len


def _check_given(decided: dict[str, Any], layers: list[Layer]) -> None:
    """Refuse other values for what the phases decide; a whole model's are those that are extended."""
    for layer in layers:
        if layer.whole_model:
            continue
        for key, value in leaves(layer.values):
            if key in ("tokens", "epochs") or (
                key in decided and not key.startswith("extend.") and decided[key] != value
            ):
                raise UserError(
                    f"{key} = {value}: [extend] decides it, phase by phase; set extend.phases instead"
                    f" ({origin_of(key, layers)})"
                )


def _tokens(phase: ExtendPhase) -> int:
    return phase.steps * phase.batch_size * phase.seq_len
