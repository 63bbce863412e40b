"""The answers to one request in the engine. In: prompts as token ids. Out: (choice, part) as they come, and their sums.

A request may hold several prompts with n answers each; choice p * n + i is answer i to prompt p.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from fireflyer.infer.async_engine import RequestParts
from fireflyer.infer.outputs import StreamPart
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.serve.errors import ApiError
from fireflyer.serve.logprobs import token_name
from fireflyer.serve.protocol import GenerationRequest
from fireflyer.serve.responses import Extras, PromptTokensDetails, TokenExtras, Usage
from fireflyer.serve.service import Service, in_thread
from fireflyer.text.tokenizer import Tokenizer

_Pumped = tuple[int, StreamPart] | Exception | None


@dataclass(frozen=True)
class Totals:
    """How a request went, known at its end."""

    usage: Usage
    extras: Extras


class Generation:
    """One request's work. While entered it has its place and is in the engine, with all its prompts.

    Entering raises ApiError when the server is full and UserError for what the engine refuses.
    """

    def __init__(
        self, service: Service, body: GenerationRequest, prompts: Sequence[list[int]], params: SamplingParams
    ) -> None:
        self._engine, self._metrics, self._admission = service.engine, service.metrics, service.admission
        self._prompts, self._params = prompts, params
        self._cache_salt = body.cache_salt
        self._experts = body.fireflyer is not None and body.fireflyer.experts
        self._place = ExitStack()
        self._parts: list[RequestParts] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[_Pumped] = asyncio.Queue()
        self._started = time.monotonic()
        self._last_at: dict[int, float] = {}
        self._cached: dict[int, int] = {}
        self._guesses: dict[int, tuple[int, int]] = {}
        self._num_tokens = 0

    async def __aenter__(self) -> Generation:
        self._place.enter_context(self._admission.place(len(self._prompts) * self._params.n))
        try:
            # In a thread: a grammar may take a while to compile, and waits for the engine's step to end.
            self._parts = await in_thread(self._requests)
            for parts in self._parts:
                parts.start()
        except BaseException:
            self._leave()
            raise
        for number, parts in enumerate(self._parts):
            self._tasks.append(asyncio.ensure_future(self._pump(number, parts)))
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._leave()

    def _leave(self) -> None:
        for parts in self._parts:
            parts.close()
        self._place.close()

    def _requests(self) -> list[RequestParts]:
        return [
            self._engine.generate(prompt, self._params, cache_salt=self._cache_salt, report_experts=self._experts)
            for prompt in self._prompts
        ]

    async def parts(self) -> AsyncGenerator[tuple[int, StreamPart], None]:
        """Everything the engine says, until every choice has its finish_reason. Raises ApiError."""
        running = len(self._prompts)
        while running:
            item = await self._queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                self._count(*item)
                yield item

    async def _pump(self, number: int, parts: RequestParts) -> None:
        try:
            async for part in parts:
                self._queue.put_nowait((number * self._params.n + part.index, _checked(part)))
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)

    def _count(self, choice: int, part: StreamPart) -> None:
        self._cached[choice // self._params.n] = part.num_cached_tokens
        self._guesses[choice] = part.num_drafted, part.num_accepted
        if not part.token_ids:
            return
        now = time.monotonic()
        if choice in self._last_at:
            self._metrics.inter_token.observe((now - self._last_at[choice]) / len(part.token_ids))
        else:
            self._metrics.first_token.observe(now - self._started)
        self._last_at[choice] = now
        self._num_tokens += len(part.token_ids)

    def totals(self) -> Totals:
        """A prompt counts once, however many answers it got."""
        prompt_tokens = sum(map(len, self._prompts))
        usage = Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._num_tokens,
            total_tokens=prompt_tokens + self._num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )
        drafted, accepted = (sum(counts) for counts in zip((0, 0), *self._guesses.values(), strict=True))
        acceptance = accepted / drafted if drafted else None
        speed = self._num_tokens / (time.monotonic() - self._started)
        return Totals(usage, Extras(acceptance=acceptance, tokens_per_s=speed))


def _checked(part: StreamPart) -> StreamPart:
    """The part, unless the engine gave the request up. Raises ApiError."""
    if part.finish_reason == "error":
        raise ApiError(500, part.error or "the engine failed on this request", code="generation_failed")
    if part.finish_reason == "abort":
        raise ApiError(503, "the server stopped this request: it is shutting down", code="shutting_down")
    return part


def token_extras(tokenizer: Tokenizer | None, part: StreamPart) -> TokenExtras:
    """What `fireflyer` in a request asks for, of one part."""
    extras = TokenExtras(
        token_ids=part.token_ids,
        tokens=[token_name(tokenizer, token_id) for token_id in part.token_ids],
        drafted=part.drafted or [False] * len(part.token_ids),
    )
    if part.experts is not None:
        extras.experts = part.experts
    return extras


def add_extras(whole: TokenExtras | None, more: TokenExtras | None) -> None:
    """Append those of the next part."""
    if whole is None or more is None:
        return
    whole.token_ids += more.token_ids
    whole.tokens += more.tokens
    whole.drafted += more.drafted
    if whole.experts is not None and more.experts is not None:
        whole.experts += more.experts
