"""The recipe of a market model: a training recipe as for text, with a table [market] beside it.

In: `presets/market.toml`, another file or a run's, and `--set key=value`. Out: a checked `MarketRecipe`, and its text.
`batch_size` counts names a step, `seq_len` the sessions that the decoder looks back over at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationError, model_validator

from fireflyer.config.files import PRESETS, read_toml
from fireflyer.config.messages import validation_message
from fireflyer.errors import UserError
from fireflyer.train.layers import put, toml_value
from fireflyer.train.recipe import as_tables, recipe_differences, recipe_of
from fireflyer.train.settings import Recipe, Table
from fireflyer.train.toml import to_toml_text

PRESET = PRESETS / "market.toml"
LONGEST_MONTH = 23
"""Sessions: scores of a month are read in one pass, with what is left of `seq_len` before it."""

_HONOURED = frozenset(
    {"seed", "steps", "tokens", "batch_size", "seq_len", "checkpoint_every", "keep_checkpoints", "threads", "log_every"}
    | {"model", "optimizer", "schedule", "balance", "mtp", "ema"}
)
_GIVEN_AS = {"device": "cpu", "dtype": "fp32"}
"""What a run's own recipe says."""

Days = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MarketSettings(Table):
    """[market]: what is forecast, from what, and the folds.

    front_end: "bars" reads continuous bars and forecasts; "tokens" reads returns as two-level tokens, for scenarios.
    horizons: sessions ahead, from the fill at t+1; all their scores make the signal (Forecast.signal).
    signal_horizon: the one that the signal is judged by, and that the baselines learn.
    burn_in: sessions at a window's beginning that have no loss. square_weight, quantile_weight: of the mean square
    error and of the quantiles' pinball loss beside the rank loss. train_months, test_months, expanding, embargo: of the
    folds, see folds.py.
    """

    front_end: Literal["bars", "tokens"] = "bars"
    horizons: Annotated[tuple[Days, ...], Strict(False), Field(min_length=1)] = (1, 5, 20)
    signal_horizon: Days = 5
    burn_in: Annotated[int, Field(ge=0)] = 16
    square_weight: Weight = 0.1
    quantile_weight: Weight = 0.1
    train_months: Days = 24
    test_months: Days = 6
    expanding: bool = False
    embargo: Annotated[int, Field(ge=0)] = 5

    @model_validator(mode="after")
    def _check(self) -> MarketSettings:
        if self.signal_horizon not in self.horizons:
            raise ValueError(f"signal_horizon {self.signal_horizon} isn't among the horizons {self.horizons}; add it")
        if tuple(sorted(set(self.horizons))) != self.horizons:
            raise ValueError(f"horizons {self.horizons} must ascend, each once")
        return self


@dataclass(frozen=True)
class MarketRecipe:
    """Everything that decides a market model, but for the data."""

    train: Recipe
    market: MarketSettings

    def to_toml(self) -> str:
        return to_toml_text({**as_tables(self.train), "market": self.market.model_dump(mode="json")})

    def differences(self, other: MarketRecipe) -> list[str]:
        """What makes `other` another model, as "key: old -> new" lines."""
        ours, theirs = self.market.model_dump(), other.market.model_dump()
        lines = [f"market.{key}: {ours[key]} -> {theirs[key]}" for key in ours if ours[key] != theirs[key]]
        return recipe_differences(self.train, other.train) + lines


def load_market_recipe(path: str | Path | None = None, overrides: Sequence[str] = ()) -> MarketRecipe:
    """The recipe in a file or a run's folder, default the shipped one; `overrides`: "key=value". Raises UserError."""
    path = PRESET if path is None else Path(path)
    if path.is_dir():
        path = path / "recipe.toml"
    values = read_toml(path)
    market = values.pop("market", {})
    own = [override for override in overrides if override.startswith("market.")]
    changed: dict[str, Any] = {"market": dict(market)}
    for override in own:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override}: not KEY=VALUE; write for example --set market.signal_horizon=5")
        put(changed, key.strip(), toml_value(text))
    others = [override for override in overrides if override not in own]
    try:
        settings = MarketSettings.model_validate(changed["market"])
    except ValidationError as error:
        raise UserError(validation_message(error, f"{path}: market", MarketSettings.model_fields)) from None
    recipe = MarketRecipe(recipe_of(values, str(path), others), settings)
    _check_honoured(recipe, path)
    return recipe


def _check_honoured(recipe: MarketRecipe, path: Path) -> None:
    """What a text run could do and this one doesn't is refused, not passed over."""
    train, market = recipe.train, recipe.market
    for key, field in Recipe.model_fields.items():
        value, default = getattr(train, key), field.get_default(call_default_factory=True)
        if value != default and key not in _HONOURED and value != _GIVEN_AS.get(key):
            raise UserError(
                f"{path}: {key} isn't for market models, which train in fp32 on the CPU, a step's names at once;"
                " leave it out"
            )
    if train.schedule.batch_start is not None:
        raise UserError(f"{path}: schedule.batch_start isn't for market models; leave it out")
    if train.seq_len < market.burn_in + LONGEST_MONTH:
        raise UserError(
            f"{path}: seq_len = {train.seq_len} is too short: a month of {LONGEST_MONTH} sessions after market.burn_in"
            f" = {market.burn_in} needs {market.burn_in + LONGEST_MONTH}"
        )
