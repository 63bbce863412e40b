"""What one request may ask of the sampler, under the names vLLM's users know. In: keyword arguments. Out: a frozen,
checked `SamplingParams`. Every field here is honoured; there is none that is merely accepted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from fireflyer.errors import UserError
from fireflyer.infer.response_format import checked_response_format, shown

# OpenAI's limits for what is added to a logit. They also bound logits, so that none of them overflows.
_PENALTY_LIMIT = 2.0
_BIAS_LIMIT = 100.0


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Raises UserError naming the field, the value and its range.

    n: answers to write for the prompt, each with draws of its own.
    max_tokens: tokens to write at most; None: as many as the context holds (vLLM stops at 16 when nothing is said).
    min_tokens: end tokens, stop_token_ids and stop strings count only after this many tokens.
    temperature: divides the logits before every filter; 0 takes the most probable token, whatever the filters say.
    top_p: keep the fewest most probable tokens whose probabilities reach this sum; 1 is off.
    top_k: keep this many most probable tokens; 0 or -1 is off.
    min_p: drop tokens less probable than this share of the most probable one; 0 is off.
    presence_penalty, frequency_penalty: taken off the logits of tokens written so far, once and once per occurrence.
    repetition_penalty: positive logits of tokens in prompt or answer are divided by it, negative multiplied; 1 is off.
    logit_bias: added to the logits of these token ids.
    seed: the same seed gives the same draws, whatever else is generated beside it; None draws afresh.
    stop: strings that end the text; they are removed from it.
    include_stop_str_in_output: leave the stop string at the end of the text.
    stop_token_ids: tokens that end the text; they stay in token_ids and leave no text.
    ignore_eos: go on past the end-of-sentence token.
    logprobs: for each token, its log-probability and those of this many most probable ones; 0: its own, -1: all.
    prompt_logprobs: the same for the tokens of the prompt.
    response_format: the form the answer has to take, after its thinking if it thinks; `response_format.py` lists them.
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
    n: int = 1
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check_lengths()
        self._check_choice()
        self._check_penalties()
        self._set("stop", _strings(self.stop))
        self._set("stop_token_ids", _token_ids(self.stop_token_ids))
        for field in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, field), bool):
                raise _refusal(field, getattr(self, field), "True or False")
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                wanted = "0 or more, -1 for the whole vocabulary, or None"
                self._set(field, _integer(field, getattr(self, field), wanted, low=-1))
        self._check_form()

    def _check_lengths(self) -> None:
        self._set("n", _integer("n", self.n, "at least 1", low=1))
        if self.max_tokens is not None:
            self._set("max_tokens", _integer("max_tokens", self.max_tokens, "at least 1, or None", low=1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, "0 or more", low=0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _refusal("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")

    def _check_choice(self) -> None:
        self._set("temperature", _number("temperature", self.temperature, "0 (greedy) or more", low=0.0))
        self._set("top_p", _number("top_p", self.top_p, "more than 0, at most 1", low=0.0, high=1.0))
        if self.top_p == 0:
            raise _refusal("top_p", self.top_p, "more than 0, at most 1")
        self._set("top_k", _integer("top_k", self.top_k, "1 or more, or 0 or -1 for off", low=-1))
        self._set("min_p", _number("min_p", self.min_p, "between 0 and 1", low=0.0, high=1.0))
        if self.seed is not None:
            wanted = "an integer of 64 bits, or None"
            self._set("seed", _integer("seed", self.seed, wanted, low=-(2**63), high=2**64 - 1))

    def _check_penalties(self) -> None:
        for field in ("presence_penalty", "frequency_penalty"):
            limit = _PENALTY_LIMIT
            self._set(field, _number(field, getattr(self, field), "between -2 and 2", low=-limit, high=limit))
        wanted = "between 0.01 and 100"
        repetition = _number("repetition_penalty", self.repetition_penalty, wanted, low=0.01, high=100.0)
        self._set("repetition_penalty", repetition)
        self._set("logit_bias", _biases(self.logit_bias))

    def _check_form(self) -> None:
        self._set("response_format", checked_response_format(self.response_format))
        if self.response_format is None:
            return
        if self.ignore_eos:
            raise UserError(
                "ignore_eos can't be used with response_format: after a finished form only the end can come"
            )
        if self.min_tokens:
            raise UserError(
                "min_tokens can't be used with response_format: the form alone says when the answer may end"
            )

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.min_p > 0 or self.top_k > 0 or self.top_p < 1

    @property
    def penalized(self) -> bool:
        """Whether a logit depends on which tokens came before, beyond what the model makes of them."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


def _refusal(field: str, value: object, wanted: str) -> UserError:
    return UserError(f"sampling parameter {field} is {shown(value)}; it must be {wanted}")


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
    try:
        number = float(value)
    except OverflowError:  # an integer beyond every float
        raise _refusal(field, value, wanted) from None
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


def _biases(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _refusal("logit_bias", value, "a dictionary from token ids to numbers between -100 and 100")
    wanted = "from token ids, 0 or more, to numbers between -100 and 100"
    biases: dict[int, float] = {}
    for token, bias in value.items():
        # JSON has only strings for keys, and OpenAI's clients send token ids so.
        token = int(token) if isinstance(token, str) and token.isdecimal() and len(token) < 10 else token
        number = _number("logit_bias", bias, wanted, low=-_BIAS_LIMIT, high=_BIAS_LIMIT)
        biases[_integer("logit_bias", token, wanted, low=0)] = number
    return biases
