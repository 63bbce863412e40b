"""One prompt on its way to an answer: what is asked, what has been written so far, why it ended; and the shapes in
which callers receive it, under vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fireflyer.infer.output_text import OutputText
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SamplingState

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `text` lacks the stop string and the end token, `token_ids` has all that was generated.

    finish_reason: "stop" for an end token or a stop, "length" for max_tokens or a full context.
    stop_reason: the stop string or the stop token id that ended it; None for the end token and for "length".
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A finished request. `prompt` is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


@dataclass(frozen=True)
class StreamPart:
    """What is new since the part before: whole characters, and the tokens generated meanwhile.

    The last part carries the finish_reason. The texts of all parts together are the text of the finished request.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __str__(self) -> str:
        return self.text


class Request:
    """A request in the engine. `output_text` is None where there is no tokenizer: then tokens are all it gives."""

    def __init__(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        end_token_ids: frozenset[int],
        output_text: OutputText | None,
    ) -> None:
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_new_tokens = max_new_tokens
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._end_token_ids = frozenset() if params.ignore_eos else end_token_ids
        self._stop_token_ids = frozenset(params.stop_token_ids or ())
        self._output_text = output_text
        self._taken = 0
        self.sampling = SamplingState(params, prompt_token_ids=prompt_token_ids, end_token_ids=self._end_token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    def accept(self, token_id: int) -> None:
        """Append a token and see whether the request ends with it."""
        self.token_ids.append(token_id)
        self.sampling.commit(token_id)
        if token_id in self._end_token_ids:
            self._finish("stop", None)
        elif token_id in self._stop_token_ids:
            self._finish("stop", token_id)
        elif self._output_text is not None and self._output_text.push(token_id):
            self._finish("stop", self._output_text.stopped_by)
        elif len(self.token_ids) >= self.max_new_tokens:
            self._finish("length", None)

    def _finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        # What was held back can still complete a stop string, when the torn end of a character becomes U+FFFD.
        if self._output_text is not None and self._output_text.finish():
            reason, stop_reason = "stop", self._output_text.stopped_by
        self.finish_reason, self.stop_reason = reason, stop_reason

    def take_part(self) -> StreamPart | None:
        """What is new since the last call; None while there is no new text, unless the request has ended."""
        text = "" if self._output_text is None else self._output_text.take()
        if not text and self._output_text is not None and not self.finished:
            return None
        new_tokens = self.token_ids[self._taken :]
        self._taken = len(self.token_ids)
        return StreamPart(text, new_tokens, self.finish_reason, self.stop_reason)

    def output(self) -> RequestOutput:
        """The finished request."""
        assert self.finish_reason is not None
        text = "" if self._output_text is None else self._output_text.text
        completion = CompletionOutput(0, text, self.token_ids, self.finish_reason, self.stop_reason)
        return RequestOutput(self.prompt, self.prompt_token_ids, [completion])
