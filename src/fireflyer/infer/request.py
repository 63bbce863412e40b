"""One prompt on its way to its answers: what is asked, what has been written so far, why it ended."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fireflyer.infer.output_text import OutputText
from fireflyer.infer.outputs import (
    CompletionOutput,
    FinishReason,
    PromptLogprobs,
    RequestOutput,
    StreamPart,
)
from fireflyer.infer.prefix_cache import CachedBlock
from fireflyer.infer.sampler import SampledToken
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SamplingState
from fireflyer.infer.structured_output import GrammarState

__all__ = ["Answer", "CompletionOutput", "FinishReason", "Request", "RequestOutput", "StreamPart"]


class Answer:
    """One of the n answers of a request: what it has written, and what the engine has computed of it.

    `tokens` are the prompt and what was accepted. The latents of the first `num_computed` of them are in `blocks`.
    """

    def __init__(self, request: Request, index: int, sampling: SamplingState, output_text: OutputText | None) -> None:
        self.request, self.index, self.sampling = request, index, sampling
        self.tokens = list(request.prompt_token_ids)
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.logprobs: list[dict] = []
        self.drafted: list[bool] = []
        self.experts: list[list[list[int]]] = []
        self.num_drafted = self.num_accepted = 0
        self._output_text = output_text
        self._taken = 0
        self._closed = False

        self.blocks: list[int] = []
        self.num_computed = 0
        self.num_shared_slots = 0
        """Slots at the beginning that belong to others too: never written."""
        self.arrival = 0
        self.chain: list[CachedBlock] = []
        """Entries of the first blocks in the prefix cache."""
        self.block_keys: list[bytes] = []
        self.chain_open = True
        """Whether the chain may grow: not after a collision."""
        self.drafts: list[int] = []
        self.mtp_tail: list[Tensor] = []
        """For MTP depth d >= 1, at d - 1: the hidden state of the depth before, in the row that is its next first."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def token_ids(self) -> list[int]:
        """What was generated."""
        return self.tokens[len(self.request.prompt_token_ids) :]

    @property
    def num_written(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def in_prompt(self) -> bool:
        """Whether there are no logits for the answer's first token yet."""
        return self.num_computed < len(self.request.prompt_token_ids)

    def accept(self, sampled: SampledToken, was_drafted: bool, experts: list[list[int]] | None) -> None:
        """Append a token and see whether the answer ends with it."""
        if sampled.error is not None:
            self.finish("error", error=sampled.error)
            return
        token_id = sampled.token_id
        self.tokens.append(token_id)
        if sampled.logprobs is not None:
            self.logprobs.append(sampled.logprobs)
        self.drafted.append(was_drafted)
        if experts is not None:
            self.experts.append(experts)
        self.sampling.commit(token_id)
        request = self.request
        if token_id in request.end_token_ids:
            self.finish("stop")
        elif token_id in request.stop_token_ids:
            self.finish("stop", token_id)
        elif self._output_text is not None and self._output_text.push(token_id):
            self.finish("stop", self._output_text.stopped_by)
        elif self.num_written >= request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """End the answer."""
        # What was held back can still complete a stop string, when the torn end of a character becomes U+FFFD.
        if self._output_text is not None and self._output_text.finish() and reason not in ("abort", "error"):
            reason, stop_reason = "stop", self._output_text.stopped_by
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def take_part(self) -> StreamPart | None:
        """What is new since the last call; None while there is no new text, unless the answer has ended."""
        text = "" if self._output_text is None else self._output_text.take()
        waits = self._taken == self.num_written if self._output_text is None else not text
        if self._closed or (waits and not self.finished):
            return None
        self._closed = self.finished
        request, new = self.request, slice(self._taken, self.num_written)
        first = self.index == 0 and self._taken == 0
        self._taken = self.num_written
        return StreamPart(
            text,
            self.token_ids[new],
            self.finish_reason,
            self.stop_reason,
            self.index,
            logprobs=self.logprobs[new] if request.params.logprobs is not None else None,
            prompt_logprobs=request.prompt_logprobs if first else None,
            drafted=self.drafted[new] if self.num_drafted else None,
            experts=self.experts[new] if request.report_experts else None,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            error=self.error,
        )

    def forget_latents(self) -> None:
        """The answer is to be computed again from its first token; what it has written stays."""
        self.blocks, self.chain, self.drafts, self.mtp_tail = [], [], [], []
        self.num_computed = self.num_shared_slots = 0
        self.chain_open = True

    def output(self) -> CompletionOutput:
        """The finished answer."""
        assert self.finish_reason is not None
        return CompletionOutput(
            self.index,
            "" if self._output_text is None else self._output_text.text,
            self.token_ids,
            self.finish_reason,
            self.stop_reason,
            self.logprobs if self.request.params.logprobs is not None else None,
            self.error,
        )


class Request:
    """A prompt and its n answers.

    Args:
        new_text: makes the text of one answer; None where there is no tokenizer: then tokens are all there is.
        new_grammar: makes what one answer is held to.
        cache_salt: prompts share latents only with others of the same salt.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        end_token_ids: frozenset[int],
        new_text: Callable[[], OutputText] | None,
        new_grammar: Callable[[], GrammarState] | None = None,
        cache_salt: str = "",
        report_experts: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt, self.prompt_token_ids, self.params = prompt, prompt_token_ids, params
        self.max_new_tokens = max_new_tokens
        self.end_token_ids = frozenset() if params.ignore_eos else end_token_ids
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self.cache_salt, self.report_experts = cache_salt, report_experts
        self.prompt_logprobs: PromptLogprobs | None = None if params.prompt_logprobs is None else [None]
        self.num_cached_tokens: int | None = None
        """Prompt tokens of the first answer that were cached; None before it is begun."""
        self.answers = [
            Answer(
                self,
                index,
                SamplingState(
                    params,
                    prompt_token_ids=prompt_token_ids,
                    end_token_ids=self.end_token_ids,
                    choice=index,
                    grammar=None if new_grammar is None else new_grammar(),
                ),
                None if new_text is None else new_text(),
            )
            for index in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return all(answer.finished for answer in self.answers)

    @property
    def wants_all_logits(self) -> bool:
        return self.params.prompt_logprobs is not None

    def fail(self, error: str) -> None:
        """End all answers with an error, before they were begun."""
        for answer in self.answers:
            answer.finish("error", error=error)

    def take_parts(self) -> list[StreamPart]:
        """What is new in each answer since the last call."""
        parts = [answer.take_part() for answer in self.answers]
        return [part for part in parts if part is not None]

    def output(self) -> RequestOutput:
        """The finished request."""
        return RequestOutput(
            self.prompt,
            self.prompt_token_ids,
            [answer.output() for answer in self.answers],
            self.prompt_logprobs,
            self.num_cached_tokens or 0,
            sum(answer.num_drafted for answer in self.answers),
            sum(answer.num_accepted for answer in self.answers),
            self.request_id,
        )
