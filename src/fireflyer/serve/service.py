"""What every endpoint shares: the engine, its tokenizer, the settings, who is inside, what was counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fireflyer.infer.async_engine import AsyncEngine
from fireflyer.serve.admission import Admission
from fireflyer.serve.errors import ApiError
from fireflyer.serve.metrics import Metrics
from fireflyer.serve.readiness import Readiness
from fireflyer.serve.settings import ServeSettings
from fireflyer.text.tokenizer import Tokenizer

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """One served model."""

    def __init__(self, engine: AsyncEngine, settings: ServeSettings) -> None:
        self.engine, self.settings = engine, settings
        self.llm = engine.llm
        self.metrics = Metrics(engine.stats)
        self.admission = Admission(self.llm.options.max_num_seqs, settings.max_queue)
        self.readiness = Readiness(self._progress, settings.step_timeout_s)
        self.created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.llm.tokenizer

    def _progress(self) -> tuple[int, bool]:
        return self.engine.stats().steps, self.admission.busy

    def check_open(self, model: str | None) -> None:
        """Raises ApiError when this server takes no more requests, or has another model."""
        self.admission.check_open()
        self.check_model(model)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one served. Leaving the name out means that one."""
        served = self.settings.served_model_name
        if name is not None and name != served:
            message = f"the model {name[:200]!r} does not exist here; this server has {served!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def tokenizer_for(self, use: str) -> Tokenizer:
        """Raises ApiError where the checkpoint has none."""
        if self.tokenizer is None:
            raise ApiError(
                400, f"this checkpoint has no tokenizer.json, which {use} needs; send token ids to /v1/completions"
            )
        return self.tokenizer

    def check_length(self, num_tokens: int, param: str) -> None:
        """Raises ApiError, with the numbers, where a prompt leaves no room for an answer."""
        limit = self.llm.max_length
        if num_tokens >= limit:
            raise ApiError(
                400,
                f"this model's context is {limit} tokens, prompt and answer together; the prompt has {num_tokens}",
                param=param,
                code="context_length_exceeded",
            )


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Work of the processor's beside the event loop. A UserError stays one."""
    return await asyncio.to_thread(function, *args, **kwargs)
