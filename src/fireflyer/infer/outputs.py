"""The shapes in which callers receive answers, whole or in parts, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fireflyer.infer.logprobs import Logprob

FinishReason = Literal["stop", "length", "abort", "error"]

PromptLogprobs = list[dict[int, Logprob] | None]
"""One entry a prompt token; None for the first, which nothing predicted."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `text` lacks the stop string and the end token, `token_ids` has all that was generated.

    finish_reason: "stop" for an end token or a stop, "length" for max_tokens or a full context, "abort" where the
        caller gave it up, "error" where it could not go on; `error` then says why.
    stop_reason: the stop string or the stop token id that ended it; None for the end token and all other reasons.
    logprobs: one dictionary a token, where asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    error: str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. `prompt` is None where token ids were given.

    num_cached_tokens: prompt tokens whose latents were there already.
    num_drafted, num_accepted: tokens of all answers that the MTP layers proposed, and of these, how many were right.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: PromptLogprobs | None = None
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    request_id: str = ""


@dataclass(frozen=True)
class StreamPart:
    """What is new of one answer. The last part of an answer has its finish_reason.

    text: whole characters only; "" where tokens have not completed one, and in a last part that adds none.
    index: which of the prompt's n answers.
    logprobs: one dictionary for each of `token_ids`, where asked for.
    prompt_logprobs: in the first part of answer 0, where asked for.
    drafted: for each of `token_ids`, whether the MTP layers had guessed it; None while nothing is drafted.
    experts: for each of `token_ids` and each MoE layer, the experts that answered, best first; where asked for.
    num_drafted, num_accepted: tokens that the MTP layers proposed for this answer so far, and of these the right ones.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    index: int = 0
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    drafted: list[bool] | None = None
    experts: list[list[list[int]]] | None = None
    num_cached_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    error: str | None = None

    def __str__(self) -> str:
        return self.text
