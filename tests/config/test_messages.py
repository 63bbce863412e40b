"""A pydantic error as one line."""

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from fireflyer.config import validation_message


def test_validation_message_puts_the_unknown_key_first_with_the_nearest_dotted_name():
    class Schedule(BaseModel):
        model_config = ConfigDict(extra="forbid")
        warmup_steps: int
        lr: float

    class Recipe(BaseModel):
        schedule: Schedule

    known = ["schedule.warmup_steps", "schedule.lr", "optimizer.eps"]

    def message(schedule: dict[str, Any]) -> str:
        with pytest.raises(ValidationError) as caught:
            Recipe.model_validate({"schedule": schedule})
        return validation_message(caught.value, "mine.toml", known)

    assert message({"lr": 1, "warmup": 5}) == (
        "mine.toml: unknown key schedule.warmup = 5; did you mean schedule.warmup_steps? (and 1 more)"
    )
    assert message({"lr": 1}) == "mine.toml: the key schedule.warmup_steps is missing; add it"
    assert message({"lr": "x" * 99, "warmup_steps": 1}).startswith("mine.toml: schedule.lr = 'xxxx")
