"""Many requests through one decoder. In: requests, whenever they come. Out: after each step, those with news.

A step: schedule spans of answers → one call of the decoder over all their rows → sample the rows that end in an
answer's last token or in a draft → accept → draft anew → keep what others may share, drop what has ended.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from fireflyer.errors import UserError
from fireflyer.infer.block_pool import BlockPool
from fireflyer.infer.model_runner import Batch, ModelRunner
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.paged_cache import PagedCache, cache_torch_dtype, free_bytes, slot_bytes
from fireflyer.infer.request import Answer, Request
from fireflyer.infer.sampler import SampledToken, Sampler
from fireflyer.infer.sampling_state import SampleRow
from fireflyer.infer.scheduler import Scheduler
from fireflyer.infer.speculative import Drafter
from fireflyer.infer.stats import EngineStats
from fireflyer.infer.stored_weights import find_store
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Routing
from fireflyer.model.row_tiles import RowTiles
from fireflyer.text.tokenizer import Tokenizer

_MEMORY_SHARE = 0.4
_LOGIT_ELEMENTS = 1 << 22
"""Numbers of one piece of a prompt's logits."""


class Engine:
    """One model, its cache, and the requests that share it. Not for several threads at once."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer | None, options: EngineOptions) -> None:
        config = model.config
        wanted = options.num_speculative_tokens
        num_depths = config.num_nextn_predict_layers
        num_drafts = num_depths if wanted is None else wanted
        if num_drafts and not num_depths:
            raise UserError(
                f"num_speculative_tokens is {num_drafts}, but the model has no MTP layer to draft with; set it to 0"
            )
        num_depths = min(num_depths, num_drafts)
        self.options = options
        self.max_length = options.max_length or config.max_position_embeddings
        dtype = cache_torch_dtype(options.cache_dtype, model.dtype)
        num_layers = config.num_hidden_layers + num_depths
        num_blocks = self._affordable_blocks(slot_bytes(num_layers, config.latent_dim, dtype), model.device)
        try:
            cache = PagedCache(
                num_layers,
                num_blocks,
                options.block_size,
                config.latent_dim,
                config.kv_lora_rank,
                dtype,
                model.dtype,
                model.device,
            )
        except (OSError, torch.cuda.OutOfMemoryError):
            raise UserError(f"cache_gib is {options.cache_gib}; the system does not give so much memory") from None
        self._model, self._cache, self._num_depths = model, cache, num_depths
        self._vocab_size = config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self._sampler = Sampler(self._vocab_size, tokenizer)
        self._num_drafts = num_drafts
        self._runner = ModelRunner(model, cache, RowTiles() if options.deterministic else None)
        self._expert_store = find_store(model)
        self._requests: dict[str, Request] = {}
        self._stats = EngineStats(blocks_total=num_blocks - 1)
        self._start_over()

    def _start_over(self) -> None:
        """An empty pool, and nothing known of what the cache holds."""
        pool = BlockPool(self._stats.blocks_total + 1, self.options.block_size)
        self._scheduler = Scheduler(pool, self.options, self._num_depths, self._stats)
        self._drafter = Drafter(self._runner, self._scheduler, self._num_depths, self._num_drafts, self._vocab_size)

    def _affordable_blocks(self, bytes_per_slot: int, device: torch.device) -> int:
        """Blocks of the cache, the null block included. Raises UserError."""
        options = self.options
        each = -(-self.max_length // options.block_size)
        block_bytes = bytes_per_slot * options.block_size
        if options.cache_gib is None:
            affordable = int(_MEMORY_SHARE * free_bytes(device)) // block_bytes
        else:
            affordable = int(options.cache_gib * 2**30) // block_bytes
        if affordable < 2:
            raise UserError(
                f"the cache would have {affordable} blocks of {block_bytes} bytes; free memory, or raise cache_gib"
            )
        wanted = each * options.max_num_seqs + 1
        return min(wanted, affordable) if options.cache_gib is None else affordable

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and answer that one answer may have: the context, or what the whole cache holds."""
        return min(self.max_length, self._stats.blocks_total * self.options.block_size)

    @property
    def unfinished(self) -> bool:
        return self._scheduler.unfinished

    @property
    def stats(self) -> EngineStats:
        scheduler, store = self._scheduler, self._expert_store
        return replace(
            self._stats,
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            blocks_used=scheduler.pool.num_used,
            blocks_cached=scheduler.pool.num_idle,
            expert_hits=0 if store is None else store.hits,
            expert_misses=0 if store is None else store.misses,
            expert_bytes=0 if store is None else store.resident_bytes,
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises UserError where it could never run, or where its id is taken."""
        if request.request_id in self._requests:
            raise UserError(f"request_id {request.request_id!r} is in use; give each request its own")
        self.check_length(len(request.prompt_token_ids))
        self._requests[request.request_id] = request
        self._scheduler.add(request)
        self._stats.prompt_tokens += len(request.prompt_token_ids)

    def check_length(self, num_tokens: int) -> None:
        """Raises UserError where a prompt of so many tokens could never run."""
        if num_tokens >= self.max_tokens:
            raise UserError(
                f"the prompt has {num_tokens} tokens, which leaves no room for an answer in the {self.max_tokens} that "
                "the cache holds; shorten it, or raise cache_gib"
            )

    def abort(self, request_id: str) -> Request | None:
        """End a request where it stands and free what it holds; None where there is no such request (any more)."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            for answer in request.answers:
                if not answer.finished:
                    answer.finish("abort")
                    self._scheduler.remove(answer)
        return request

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: the weights are others than those that filled it."""
        self._scheduler.prefix_cache.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError when the pool of blocks does not add up."""
        self._scheduler.check_integrity()

    def step(self) -> list[Request]:
        """Compute one step; the requests that have new tokens or have ended.

        What goes wrong with one request ends that one with "error". An exception is of the engine itself: the requests
        of this step end with "error", all others start over, and it is raised.
        """
        started = time.perf_counter()
        answers: list[Answer] = []
        try:
            news = self._step(answers)
            if not self.unfinished:
                self.check_integrity()
        except BaseException as error:
            self._recover(answers if isinstance(error, Exception) else [], error)
            raise
        self._stats.steps += 1
        self._stats.step_s += time.perf_counter() - started
        return news

    @torch.inference_mode()
    def _step(self, answers: list[Answer]) -> list[Request]:
        spans = self._scheduler.schedule()
        assert spans or not self.unfinished, "nothing can be scheduled"
        if not spans:
            return []
        answers += [span.answer for span in spans]
        batch = self._runner.batch(spans)
        token_ids = [
            token for span in batch.spans for token in (span.answer.tokens + span.answer.drafts)[span.start : span.stop]
        ]
        started = time.perf_counter()
        out = self._runner.trunk(batch, token_ids)
        self._stats.model_s += time.perf_counter() - started
        hidden_ND = out.hidden_BTD[0]
        self._score_prompts(batch, hidden_ND)
        self._sample(batch, hidden_ND, out.routing)
        if self._num_depths:
            started = time.perf_counter()
            self._drafter.draft(batch, hidden_ND)
            self._stats.model_s += time.perf_counter() - started
        for span in batch.spans:
            self._scheduler.computed(span.answer)
            if span.answer.finished:
                self._drop(span.answer)
        return list(dict.fromkeys(span.answer.request for span in spans))

    def _sample(self, batch: Batch, hidden_ND: Tensor, routing: list[Routing]) -> None:
        """Choose tokens for all rows that reach the end of what is known, and accept them."""
        rows: list[SampleRow] = []
        places: list[int] = []
        ending: list[tuple[Answer, int]] = []
        for span, first_row in zip(batch.spans, batch.first_rows, strict=True):
            answer = span.answer
            if span.stop < answer.num_tokens:
                answer.num_computed = span.stop
                continue
            count = span.stop - answer.num_tokens + 1
            last_known = first_row + answer.num_tokens - 1 - span.start
            ending.append((answer, len(rows)))
            places += range(last_known, last_known + count)
            rows += [SampleRow(answer.sampling, tuple(answer.drafts[:j])) for j in range(count)]
        if not rows:
            return
        started = time.perf_counter()
        logits_RV = self._runner.logits(hidden_ND if len(places) == len(hidden_ND) else hidden_ND[places])
        self._stats.model_s += time.perf_counter() - started
        sampled = self._sampler(rows, logits_RV)
        for answer, first in ending:
            count = len(answer.drafts) + 1
            own = [
                [layer.indices_NK[place].tolist() for layer in routing] if answer.request.report_experts else None
                for place in places[first : first + count]
            ]
            self._accept(answer, sampled[first : first + count], own)

    def _accept(self, answer: Answer, sampled: list[SampledToken], experts: list[list[list[int]] | None]) -> None:
        """Accept the drafts that were right and the token after them. Nothing that fails here reaches other answers."""
        written, drafts = answer.num_written, answer.drafts
        right = 0
        try:
            for place, token in enumerate(sampled):
                was_right = place < len(drafts) and token.token_id == drafts[place]
                answer.accept(token, was_right, experts[place])
                right += was_right
                if answer.finished or not was_right:
                    break
        except Exception as error:
            answer.finish("error", error=f"this request failed: {error}")
        answer.num_computed = answer.num_tokens - 1
        answer.num_drafted += len(drafts)
        answer.num_accepted += right
        self._stats.generated_tokens += answer.num_written - written
        self._stats.drafted_tokens += len(drafts)
        self._stats.accepted_tokens += right

    def _score_prompts(self, batch: Batch, hidden_ND: Tensor) -> None:
        """Log-probabilities of prompt tokens, where asked for; never more logits at a time than a small piece."""
        for span, first_row in zip(batch.spans, batch.first_rows, strict=True):
            request = span.answer.request
            scored = request.prompt_logprobs
            if scored is None or request.params.prompt_logprobs is None:
                continue
            prompt = request.prompt_token_ids
            rows = max(_LOGIT_ELEMENTS // self._model.config.vocab_size, 1)
            while len(scored) < min(len(prompt), span.stop + 1):
                position = len(scored) - 1
                stop = min(position + rows, span.stop, len(prompt) - 1)
                place = first_row + position - span.start
                logits_TV = self._runner.logits(hidden_ND[place : place + stop - position])
                scored += self._sampler.prompt_logprobs(
                    logits_TV, prompt[position + 1 : stop + 1], request.params.prompt_logprobs
                )

    def _drop(self, answer: Answer) -> None:
        spoiled = self._scheduler.remove(answer)
        if spoiled:
            self._cache.wipe(spoiled)
        if answer.request.finished:
            self._requests.pop(answer.request.request_id, None)

    def _recover(self, failed: list[Answer], error: BaseException) -> None:
        """Out of the middle of a step: every answer begins anew from the tokens it has, in an empty pool."""
        for answer in failed:
            answer.forget_latents()
            if not answer.finished:
                answer.finish("error", error=f"the engine failed: {error}")
        self._requests = {name: request for name, request in self._requests.items() if not request.finished}
        self._start_over()
        for request in self._requests.values():
            for answer in request.answers:
                answer.forget_latents()
            self._scheduler.add(request)
