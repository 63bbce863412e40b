"""/v1/completions: prompts as text or token ids, answers as text. In: a CompletionRequest. Out: one object, or chunks.

Both come from the same pieces: a whole answer is what its chunks add up to.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fireflyer.infer.outputs import StreamPart
from fireflyer.serve.generation import Generation, Totals, add_extras, token_extras
from fireflyer.serve.logprobs import CompletionLogprobsWriter, TokenLogprobs
from fireflyer.serve.protocol import CompletionRequest
from fireflyer.serve.responses import Completion, CompletionChoice, Extras, TokenExtras, Usage
from fireflyer.serve.sampling import sampling_params
from fireflyer.serve.service import Service, in_thread
from fireflyer.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE

_Piece = tuple[CompletionChoice, TokenExtras | None]


class CompletionAnswer:
    """The answer to one request: iterate `chunks`, or await `whole`. Both raise ApiError and UserError."""

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self._service, self._body = service, body
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    async def chunks(self) -> AsyncGenerator[Completion, None]:
        """Piece by piece; at the end the usage and how it went, if asked for."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Totals):
                    usage = piece.usage if self._body.include_usage else None
                    if usage or self._body.fireflyer:
                        yield self._object([], usage, piece.extras)
                else:
                    choice, extras = piece
                    yield self._object([choice], None, extras and Extras(**dict(extras)))

    async def whole(self) -> Completion:
        """All at once."""
        choices: dict[int, CompletionChoice] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Totals):
                    return self._object([choices[i] for i in sorted(choices)], piece.usage, piece.extras)
                choice, extras = piece
                if choice.index in choices:
                    _extend(choices[choice.index], choice, extras)
                else:
                    choices[choice.index] = choice
                    if extras is not None:
                        choice.fireflyer = extras
        raise AssertionError("pieces end with the totals")

    async def _pieces(self) -> AsyncGenerator[_Piece | Totals, None]:
        body, service = self._body, self._service
        prompts = await in_thread(self._encode)
        params = sampling_params(
            body,
            service.settings,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        choices = [
            _Choice(service, body, number * body.n + index, prompt, echoed)
            for number, (prompt, echoed) in enumerate(zip(prompts, self._echoed(prompts), strict=True))
            for index in range(body.n)
        ]
        generation = Generation(service, body, prompts, params)
        async with generation:
            async for index, part in generation.parts():
                piece = choices[index].push(part)
                if piece is not None:
                    yield piece, token_extras(service.tokenizer, part) if body.fireflyer else None
        yield generation.totals()

    def _encode(self) -> list[list[int]]:
        service, body = self._service, self._body
        if body.suffix is not None:
            prompts = [self._around_hole(prompt, body.suffix) for prompt in body.prompts]
        else:
            prompts = [service.llm.encode_prompt(p) if isinstance(p, str) else p for p in body.prompts]
        for prompt in prompts:
            service.check_length(len(prompt), "prompt")
        return prompts

    def _around_hole(self, prompt: str | list[int], suffix: str) -> list[int]:
        """Prefix, suffix, and then the middle is what the model writes (DeepSeek-V3 report, section 4.1)."""
        tokenizer = self._service.tokenizer_for("suffix")
        begin, hole, end = (tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
        prefix = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return [tokenizer.bos_id, begin, *prefix, hole, *tokenizer.encode(suffix), end]

    def _echoed(self, prompts: list[list[int]]) -> list[str]:
        tokenizer = self._service.tokenizer
        return [
            given if isinstance(given, str) else "" if tokenizer is None else tokenizer.decode(prompt)
            for given, prompt in zip(self._body.prompts, prompts, strict=True)
        ]

    def _object(self, choices: list[CompletionChoice], usage: Usage | None, extras: Extras | None) -> Completion:
        completion = Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._service.settings.served_model_name,
            choices=choices,
        )
        if usage is not None or self._body.include_usage:
            completion.usage = usage
        if extras is not None and self._body.fireflyer is not None:
            completion.fireflyer = extras
        return completion


class _Choice:
    """One answer while it grows."""

    def __init__(self, service: Service, body: CompletionRequest, index: int, prompt: list[int], echoed: str) -> None:
        self._index = index
        self._logprobs = None
        if body.logprobs is not None:
            self._logprobs = CompletionLogprobsWriter(service.tokenizer, body.logprobs)
        self._echo = (echoed, prompt) if body.echo else None

    def push(self, part: StreamPart) -> CompletionChoice | None:
        """What a part of the engine adds; None for nothing that a client could use."""
        text, token_ids, entries = part.text, part.token_ids, list[TokenLogprobs | None](part.logprobs or ())
        if self._echo is not None:
            echoed, prompt = self._echo
            text, token_ids, entries = echoed + text, prompt + token_ids, [*(part.prompt_logprobs or ()), *entries]
            self._echo = None
        if not text and not token_ids and part.finish_reason is None:
            return None
        choice = CompletionChoice(index=self._index, text=text, logprobs=None, finish_reason=None)
        if self._logprobs is not None:
            choice.logprobs = self._logprobs.write(token_ids, entries)
        if part.finish_reason == "stop" or part.finish_reason == "length":
            choice.finish_reason, choice.stop_reason = part.finish_reason, part.stop_reason
        return choice


def _extend(whole: CompletionChoice, more: CompletionChoice, extras: TokenExtras | None) -> None:
    """Append a piece of the same choice."""
    whole.text += more.text
    if whole.logprobs is not None and more.logprobs is not None:
        whole.logprobs.tokens += more.logprobs.tokens
        whole.logprobs.token_logprobs += more.logprobs.token_logprobs
        whole.logprobs.text_offset += more.logprobs.text_offset
        if whole.logprobs.top_logprobs is not None and more.logprobs.top_logprobs is not None:
            whole.logprobs.top_logprobs += more.logprobs.top_logprobs
    if more.finish_reason is not None:
        whole.finish_reason, whole.stop_reason = more.finish_reason, more.stop_reason
    add_extras(whole.fireflyer, extras)
