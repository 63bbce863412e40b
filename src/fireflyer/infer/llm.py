"""The face of generation. In: a CHECKPOINT, prompts, sampling parameters. Out: answers, whole or as a stream.

Names are those vLLM's users know. Decoding runs on the cached latents in absorbed form (report 2.1.1): each token costs
kv_lora_rank + qk_rope_head_dim numbers a layer.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, cast

import torch

from fireflyer.checkpoint.adapter import load_adapter_tokenizer
from fireflyer.checkpoint.hf import load_tokenizer, resolve_checkpoint
from fireflyer.errors import UserError
from fireflyer.infer.async_engine import AsyncEngine
from fireflyer.infer.engine import Engine
from fireflyer.infer.options import CacheDtype, EngineOptions
from fireflyer.infer.output_text import OutputText
from fireflyer.infer.outputs import RequestOutput, StreamPart
from fireflyer.infer.request import Request
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.structured_output import GrammarCompiler, GrammarState
from fireflyer.infer.weights import load_weights
from fireflyer.model.decoder import Decoder
from fireflyer.numerics.integer import Kind
from fireflyer.text.stream import StreamDecoder
from fireflyer.text.templates import Message
from fireflyer.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]

_DTYPES = (torch.float32, torch.bfloat16)


class LLM:
    """A loaded model that answers prompts. Its engine, and with it the prefix cache, lives as long as it does.

    Args:
        path: a CHECKPOINT: a folder in the published format, a run folder (its newest good checkpoint), a GGUF file.
        dtype: torch.float32 or torch.bfloat16; "auto" is float32 on a CPU and bfloat16 on a GPU.
        quantization: "int8" or "int4" packs the weights on the way in; a folder that holds packed ones needs none.
        expert_memory: memory for routed experts, as "8GiB" or a number of bytes; those that don't fit are read from the
            checkpoint's files when they are needed, and the answers are the same. None: all of them are in memory.
        adapter: a LoRA adapter (PEFT's two files, or the run that trained it) to add to the weights.
        device: where the model runs, "cpu" or "cuda".
        max_length, max_num_seqs, max_step_tokens, block_size, cache_gib, cache_dtype, prefix_cache,
            num_speculative_tokens, deterministic: as `EngineOptions` says.

    Raises UserError for a checkpoint that can't be read, a device that isn't there, a dtype that doesn't serve.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str = "cpu",
        quantization: Kind | None = None,
        expert_memory: str | int | None = None,
        adapter: str | Path | None = None,
        max_length: int | None = None,
        max_num_seqs: int = 64,
        max_step_tokens: int = 2048,
        block_size: int = 16,
        cache_gib: float | None = None,
        cache_dtype: CacheDtype = "auto",
        prefix_cache: bool = True,
        num_speculative_tokens: int | None = None,
        deterministic: bool = False,
    ) -> None:
        options = EngineOptions(
            max_length,
            max_num_seqs,
            max_step_tokens,
            block_size,
            cache_gib,
            cache_dtype,
            prefix_cache,
            num_speculative_tokens,
            deterministic,
        )
        target = _checked_device(device)
        chosen = _checked_dtype(dtype, target)
        folder = resolve_checkpoint(path)
        model = load_weights(folder, chosen, target, quantization, expert_memory, adapter)
        self._set_up(model, load_adapter_tokenizer(adapter) or load_tokenizer(folder), str(path), options)
        self._end_token_ids |= _generation_config_end_ids(folder)

    @classmethod
    def from_model(
        cls,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        max_length: int | None = None,
        max_num_seqs: int = 64,
        options: EngineOptions | None = None,
    ) -> LLM:
        """Around a model that is in memory already, which may go on training between calls.

        So what a call finds in the prefix cache is its own: it is emptied when a call begins and nothing else runs.
        options: instead of the two before it.
        """
        llm = cls.__new__(cls)
        llm._set_up(model, tokenizer, "the model in memory", options or EngineOptions(max_length, max_num_seqs))
        llm._weights_may_change = True
        return llm

    def _set_up(self, model: Decoder, tokenizer: Tokenizer | None, source: str, options: EngineOptions) -> None:
        limit = model.config.max_position_embeddings
        if options.max_length is not None and options.max_length > limit:
            raise UserError(
                f"max_length is {options.max_length}; it must lie between 2 and the model's max_position_embeddings, "
                f"{limit}"
            )
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
                "tokenizer.json belongs to another model"
            )
        self.model, self.tokenizer, self.config, self.options = model, tokenizer, model.config, options
        self.engine = Engine(model, tokenizer, options)
        self.lock = threading.RLock()
        """Held for each step and each change of `engine`: calls may come from several threads."""
        self.max_length = self.engine.max_length
        self._source = source
        self._weights_may_change = False
        self._async_engine = AsyncEngine(self)
        self._grammar_compiler: GrammarCompiler | None = None
        self._end_token_ids = _as_set(model.config.eos_token_id)
        if tokenizer is not None:
            self._end_token_ids |= {tokenizer.eos_id}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers in the order of the prompts, decoded together.

        Args:
            prompts: a text, or token ids, or a list of these. Text is preceded by the begin token, once.
            sampling_params: one for all prompts, or a list with one for each.

        An answer that could not go on has finish_reason "error"; the others are whole.

        Raises UserError, naming the prompt by its index, before anything is generated; and where no answer could go on.
        """
        listed = _listed(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(listed)
        elif len(sampling_params) != len(listed):
            raise UserError(
                f"{len(sampling_params)} sampling parameters were given for {len(listed)} prompts; "
                "give one for all, or one for each"
            )
        requests = []
        for index, (prompt, params) in enumerate(zip(listed, sampling_params, strict=True)):
            try:
                requests.append(self.make_request(prompt, params))
            except UserError as error:
                raise UserError(f"prompts[{index}]: {error}") from None
        for _ in self._steps(requests):
            pass
        outputs = [request.output() for request in requests]
        answers = [answer for output in outputs for answer in output.outputs]
        if answers and all(answer.finish_reason == "error" for answer in answers):
            raise UserError(str(answers[0].error))
        return outputs

    def _steps(self, requests: Sequence[Request]) -> Iterator[None]:
        """Add requests and step until all have ended, a turn after each step; leaving early gives them up."""
        try:
            with self.lock:
                self._before_call()
                for request in requests:
                    self.engine.add(request)
            while not all(request.finished for request in requests):
                with self.lock:
                    self.engine.step()
                yield
        finally:
            with self.lock:
                for request in requests:
                    self.engine.abort(request.request_id)

    def _before_call(self) -> None:
        if self._weights_may_change and not self.engine.unfinished:
            self.engine.forget_prefixes()

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """The assistant's next message of a conversation, or of each of several; `encode_chat` says what is fed."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        return self.generate([self.encode_chat(conversation) for conversation in conversations], sampling_params)

    def stream_sync(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[StreamPart]:
        """The answer in parts as it grows. Raises UserError at the call, not at the first part."""
        return self._parts(self.make_request(prompt, sampling_params or SamplingParams()))

    def _parts(self, request: Request) -> Iterator[StreamPart]:
        for _ in self._steps([request]):
            yield from request.take_parts()

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AsyncIterator[StreamPart]:
        """As `stream_sync`, for `async for`: steps run in a thread, so the event loop stays free.

        Leaving the loop or cancelling the task ends the generation within one step.
        """
        with self.lock:
            self._before_call()
        return self._async_engine.generate(prompt, sampling_params or SamplingParams())

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a text prompt: special tokens in it count, and it begins with exactly one begin token."""
        return self._tokenizer_for("a text prompt", "give the prompt as token ids").encode_prompt(prompt)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation in the checkpoint's own template, up to where the assistant's answer begins."""
        return self._tokenizer_for("a chat", "only prompts of token ids can be used").encode_chat(messages)

    def _tokenizer_for(self, use: str, remedy: str) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError(f"{self._source} has no tokenizer.json, which {use} needs; {remedy}")
        return self.tokenizer

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        report_experts: bool = False,
    ) -> Request:
        """A checked request, not in the engine yet. Raises UserError."""
        if not isinstance(params, SamplingParams):
            raise UserError(f"sampling parameters must be SamplingParams, not {type(params).__name__}")
        text = prompt if isinstance(prompt, str) else None
        token_ids = self.encode_prompt(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        self._check_prompt(token_ids)
        vocab_size = self.config.vocab_size
        for field, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            beyond = [token for token in tokens or () if token >= vocab_size]
            if beyond:
                raise UserError(f"{field} has {beyond[0]}; the model's vocabulary ends at {vocab_size - 1}")
        if params.stop:
            self._tokenizer_for("a stop string", "use stop_token_ids")
        room = self.engine.max_tokens - len(token_ids)
        return Request(
            request_id or uuid.uuid4().hex,
            text,
            token_ids,
            params,
            max_new_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            end_token_ids=frozenset(self._end_token_ids),
            new_text=None if self.tokenizer is None else partial(_output_text, self.tokenizer, params),
            new_grammar=self._grammar(params, token_ids),
            cache_salt=cache_salt,
            report_experts=report_experts,
        )

    def _grammar(self, params: SamplingParams, prompt_token_ids: list[int]) -> Callable[[], GrammarState] | None:
        """What makes the grammars of a request's answers; None where it asks for none. Raises UserError."""
        if params.response_format is None:
            return None
        tokenizer = self._tokenizer_for("response_format", "leave response_format out")
        with self.lock:
            if self._grammar_compiler is None:
                self._grammar_compiler = GrammarCompiler(tokenizer, self._end_token_ids)
        return partial(self._grammar_compiler.start, params.response_format, prompt_token_ids)

    def _check_prompt(self, token_ids: list[int]) -> None:
        if not token_ids:
            raise UserError("the prompt is an empty list; give at least one token id")
        vocab_size = self.config.vocab_size
        wrong = [token for token in token_ids if not 0 <= token < vocab_size]
        if wrong:
            raise UserError(f"the prompt has token id {wrong[0]}; the model's vocabulary is 0 to {vocab_size - 1}")
        if len(token_ids) >= self.max_length:
            raise UserError(
                f"the prompt has {len(token_ids)} tokens, which leaves no room for an answer in the context of "
                f"{self.max_length}; shorten it"
            )
        self.engine.check_length(len(token_ids))


def _output_text(tokenizer: Tokenizer, params: SamplingParams) -> OutputText:
    return OutputText(
        StreamDecoder(tokenizer),
        params.stop or (),
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts out of one or many; a list of integers is one prompt of token ids. Raises UserError."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise UserError(f"prompts are a {type(prompts).__name__}; give a text, token ids, or a list of these")
    one = bool(prompts) and isinstance(prompts[0], Integral)
    return cast(list[Prompt], [prompts] if one else list(prompts))


def _token_ids(prompt: object) -> list[int]:
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(token, Integral) for token in prompt):
        raise UserError(f"a prompt must be a text or a list of token ids, not {prompt!r:.60}")
    return [int(token) for token in prompt]


def _checked_device(device: torch.device | str) -> torch.device:
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}; it must be cpu or cuda") from None
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device!r}, but torch finds no CUDA GPU on this machine; use cpu")
    return target


def _checked_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in _DTYPES:
        raise UserError(
            f"dtype is {dtype!r}; it must be torch.float32, torch.bfloat16 or 'auto' (these models overflow float16)"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _generation_config_end_ids(folder: Path) -> set[int]:
    """End tokens that only generation_config.json names: chat models often add theirs there. Raises UserError."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return set()
    try:
        end_ids = _as_set(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is not a JSON object with token ids in it; mend or remove it") from None
    if not all(isinstance(token, int) for token in end_ids):
        raise UserError(f"{path}: eos_token_id must be a token id or a list of them; mend or remove it")
    return end_ids


def _as_set(token_ids: int | list[int] | None) -> set[int]:
    if token_ids is None:
        return set()
    return {token_ids} if isinstance(token_ids, int) else set(token_ids)
