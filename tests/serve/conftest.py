"""A tokenizer trained on a few lines, an engine that says what it is told, and a real one over a tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from fireflyer.errors import UserError
from fireflyer.infer.logprobs import Logprob
from fireflyer.infer.outputs import StreamPart
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.stats import EngineStats
from fireflyer.serve.app import create_app
from fireflyer.serve.settings import ServeSettings
from fireflyer.text.stream import StreamDecoder
from fireflyer.text.tokenizer import Tokenizer

MAX_LENGTH = 400


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    lines = ["the quick brown fox jumps over the lazy dog, the end.", "über 漢字 and 🎉🎊"] * 8
    return Tokenizer.train(lines, vocab_size=320)


class ScriptedParts:
    """RequestParts' face. What was started must be closed: `engine.prompts` and `engine.closed` tell."""

    def __init__(self, engine: ScriptedEngine, prompt: list[int], params: SamplingParams, answer) -> None:
        self._engine, self._prompt, self._params, self._answer = engine, prompt, params, answer

    def start(self) -> None:
        asyncio.get_running_loop()
        if 998 in self._prompt:
            raise UserError("the engine is closed")
        self._engine.prompts.append(self._prompt)
        self._engine.params.append(self._params)

    def close(self) -> None:
        self._engine.closed += 1

    def __aiter__(self) -> AsyncIterator[StreamPart]:
        return self._answer


@dataclass
class ScriptedEngine:
    """An AsyncEngine's face. Every answer is `text`, one token a step; `hold`, where it is set, is awaited before each.

    Log-probabilities are -token_id / 1000 for the token itself; the tokens 40, 41, ... are the most probable ones.
    """

    tokenizer: Tokenizer
    text: str = "the fox 漢字"
    running: int = 0
    steps: int = 0
    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    closed: int = 0
    hold: asyncio.Event | None = None
    failure: str | None = None

    def __post_init__(self) -> None:
        self.llm = SimpleNamespace(
            tokenizer=self.tokenizer,
            max_length=MAX_LENGTH,
            config=SimpleNamespace(n_routed_experts=8),
            options=SimpleNamespace(max_num_seqs=4),
            encode_prompt=lambda text: [self.tokenizer.bos_id, *self.tokenizer.encode(text, allow_special=True)],
        )

    def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        report_experts: bool = False,
    ) -> ScriptedParts:
        if 999 in prompt:
            raise UserError(f"the prompt has token id {max(prompt)}")
        return ScriptedParts(self, prompt, params, self._answer(prompt, params, report_experts))

    async def _answer(self, prompt: list[int], params: SamplingParams, experts: bool) -> AsyncIterator[StreamPart]:
        tokens = [*self.tokenizer.encode(self.text, allow_special=True), self.tokenizer.eos_id]
        cut = params.max_tokens is not None and params.max_tokens < len(tokens)
        tokens = tokens[: params.max_tokens] if cut else tokens
        decoders = [StreamDecoder(self.tokenizer) for _ in range(params.n)]
        self.running += 1
        try:
            for place, token in enumerate(tokens):
                if self.hold is not None:
                    await self.hold.wait()
                await asyncio.sleep(0)
                self.steps += 1
                last = place + 1 == len(tokens)
                for index, decoder in enumerate(decoders):
                    text = decoder.push(token) + (decoder.flush() if last else "")
                    reason = ("length" if cut else "stop") if last else None
                    yield StreamPart(
                        text,
                        [token],
                        "error" if self.failure and last else reason,
                        index=index,
                        logprobs=None if params.logprobs is None else [self._logprobs(token, params.logprobs)],
                        prompt_logprobs=self._prompt_logprobs(prompt, params) if place == index == 0 else None,
                        drafted=[place % 2 == 1],
                        experts=[[[place, 1], [2, 3]]] if experts else None,
                        num_cached_tokens=3,
                        error=self.failure,
                    )
        finally:
            self.running -= 1

    def _logprobs(self, token: int, count: int) -> dict[int, Logprob]:
        entries = {token: Logprob(-token / 1000, 99, self.tokenizer.token_text(token))}
        return entries | {
            40 + i: Logprob(-i / 10, i + 1, self.tokenizer.token_text(40 + i)) for i in range(count) if 40 + i != token
        }

    def _prompt_logprobs(self, prompt: list[int], params: SamplingParams) -> list[dict[int, Logprob] | None] | None:
        if params.prompt_logprobs is None:
            return None
        return [None, *(self._logprobs(token, params.prompt_logprobs) for token in prompt[1:])]

    def stats(self) -> EngineStats:
        return EngineStats(self.steps, self.running, 0, 10, 2, 3, 4, 5, 6, 7, 8, 9, 1.5, 0.5)


@pytest.fixture
def engine(tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer)


@pytest.fixture
def make_client(engine) -> Callable[..., httpx.AsyncClient]:
    """make_client(**settings): a client of an application around the scripted engine, in this process."""

    def make(**settings) -> httpx.AsyncClient:
        app = create_app(engine, ServeSettings(**{"served_model_name": "tiny", **settings}))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://server")

    return make


TINY = {
    "vocab_size": 336,  # 16 more than the tokenizer has, as published checkpoints pad theirs
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.fixture(scope="session")
def model():
    """A V3 of 25,000 parameters with an MTP layer; what it says is random, and no token is all its mass."""
    import torch

    from fireflyer.config import ModelConfig
    from fireflyer.model.decoder import Decoder, init_weights_

    model = Decoder(ModelConfig.from_dict(TINY))
    init_weights_(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="session")
def checkpoint(model, tokenizer, tmp_path_factory) -> Path:
    """It, in the published format."""
    from fireflyer import save_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def real_engine(model, tokenizer):
    """The engine over it: 8 answers at a time, and a cache too small for 8 long ones."""
    from fireflyer.infer.async_engine import AsyncEngine
    from fireflyer.infer.llm import LLM
    from fireflyer.infer.options import EngineOptions

    options = EngineOptions(max_num_seqs=8, max_step_tokens=64, block_size=4)
    engine = AsyncEngine(LLM.from_model(model, tokenizer, options=options))
    yield engine
    asyncio.run(engine.close())
