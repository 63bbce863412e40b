"""What the tables of a recipe are made of: kinds of values, the checked and frozen table, settings that disagree."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PlainValidator

from fireflyer.train.quantities import parse_boundary, parse_quantity

Tokens = Annotated[int, PlainValidator(parse_quantity)]
Boundary = Annotated[int | str, PlainValidator(parse_boundary)]
Fraction01 = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class SettingError(ValueError):
    """Settings that contradict one another; `key` is the dotted one to change."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
