"""What one request may ask of the sampler, under the names vLLM's users know. In: keyword arguments. Out: a frozen,
checked `SamplingParams`. Every field here is honoured; there is none that is merely accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fireflyer.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises UserError naming the field, the value and its range.

    max_tokens: tokens to write at most; None: as many as the context holds (vLLM stops at 16 when nothing is said).
    temperature: divides the logits before every filter; 0 takes the most probable token, whatever the filters say.
    top_p: keep the fewest most probable tokens whose probabilities reach this sum; 1 is off.
    top_k: keep this many most probable tokens; 0 or -1 is off.
    min_p: drop tokens less probable than this share of the most probable one; 0 is off.
    seed: the same seed gives the same draws, whatever else is generated beside it; None draws afresh.
    stop: strings that end the text; they are removed from it.
    stop_token_ids: tokens that end the text; they stay in token_ids and leave no text.
    ignore_eos: go on past the end-of-sentence token.
    """

    max_tokens: int | None = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, "at least 1, or None", low=1))
        self._set("temperature", _number("temperature", self.temperature, "0 (greedy) or more", low=0.0))
        self._set("top_p", _number("top_p", self.top_p, "more than 0, at most 1", low=0.0, high=1.0))
        if self.top_p == 0:
            raise _refusal("top_p", self.top_p, "more than 0, at most 1")
        self._set("top_k", _integer("top_k", self.top_k, "1 or more, or 0 or -1 for off", low=-1))
        self._set("min_p", _number("min_p", self.min_p, "between 0 and 1", low=0.0, high=1.0))
        if self.seed is not None:
            wanted = "an integer of 64 bits, or None"
            self._set("seed", _integer("seed", self.seed, wanted, low=-(2**63), high=2**64 - 1))
        self._set("stop", _strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "True or False")

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _refusal(field: str, value: object, wanted: str) -> UserError:
    return UserError(f"sampling parameter {field} is {value!r}; it must be {wanted}")


def _integer(field: str, value: object, wanted: str, *, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _refusal(field, value, f"an integer, {wanted}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise _refusal(field, value, wanted)
    return number


def _number(field: str, value: object, wanted: str, *, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _refusal(field, value, f"a number, {wanted}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        raise _refusal(field, value, wanted)
    return number


def _strings(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else value
    wanted = "a string or a list of strings, none of them empty"
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) and string for string in strings):
        raise _refusal("stop", value, wanted)
    return tuple(strings)


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise _refusal("stop_token_ids", value, "a list of token ids")
    return tuple(_integer("stop_token_ids", token, "0 or more", low=0) for token in value)
