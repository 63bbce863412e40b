"""Who computes what in the next step. In: answers that wait or run, and the block pool. Out: spans of tokens.

First come, first served: answers that decode have their rows first, then prompts are read in pieces, as far as the
step's tokens reach. When blocks run out, the latest comer gives its own back and is computed again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fireflyer.infer.block_pool import BlockPool
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.prefix_cache import PrefixCache
from fireflyer.infer.request import Answer, Request
from fireflyer.infer.stats import EngineStats


@dataclass(frozen=True)
class Span:
    """Positions `start` to `stop` of an answer: known tokens, then its drafts."""

    answer: Answer
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class Scheduler:
    """Waiting and running answers, and the blocks they hold.

    mtp_depths: MTP layers that draft: a cached block's last rows in these depend on tokens after the block, so that as
    many blocks at the end of a hit are computed again.
    """

    def __init__(self, pool: BlockPool, options: EngineOptions, mtp_depths: int, stats: EngineStats) -> None:
        self.pool = pool
        self.prefix_cache = PrefixCache(pool)
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self._options, self._mtp_depths, self._stats = options, mtp_depths, stats
        self._margin = -(-mtp_depths // pool.block_size)
        self._held: dict[Answer, list[Answer]] = {}
        self._arrivals = 0

    def add(self, request: Request) -> None:
        """Queue all answers of a request. Those after the first wait until its prompt is in the cache, to share it."""
        leader, *others = [answer for answer in request.answers if not answer.finished]
        for answer in (leader, *others):
            answer.arrival = self._arrivals
            self._arrivals += 1
        self.waiting.append(leader)
        self._held[leader] = others

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + sum(map(len, list(self._held.values())))  # a copy: other threads read this

    def schedule(self) -> list[Span]:
        """The next step's spans, at most `max_step_tokens` rows in all, in blocks that are theirs."""
        spans: dict[Answer, Span] = {}
        budget = self._options.max_step_tokens
        decoding = [answer for answer in self.running if _rest(answer) == 1]
        reading = [answer for answer in self.running if _rest(answer) > 1]
        if sum(1 + len(answer.drafts) for answer in decoding) > budget:
            for answer in decoding:  # every answer's next token goes before anybody's drafts
                answer.drafts.clear()
        for answer in decoding + reading:
            if budget <= 0:
                break
            if answer in self.running:
                budget -= self._extend(answer, budget, spans)
        while self.waiting and budget > 0 and len(self.running) < self._options.max_num_seqs:
            answer = self.waiting[0]
            if not self._admit(answer):
                break
            self.waiting.popleft()
            self.running.append(answer)
            budget -= self._extend(answer, budget, spans)
        return list(spans.values())

    def grow(self, answer: Answer, num_slots: int) -> bool:
        """Blocks for `num_slots` slots of a running answer, if they can be had without taking them from anybody."""
        missing = self._missing(answer, num_slots)
        blocks = self.pool.allocate(missing, answer.blocks[-1] if answer.blocks else None) if missing > 0 else []
        if blocks is None:
            return False
        answer.blocks += blocks
        return True

    def computed(self, answer: Answer) -> None:
        """After a step: put full blocks into the prefix cache, let those follow who waited for the prompt."""
        if answer.chain_open and (self._options.prefix_cache or answer.request.params.n > 1):
            size = self.pool.block_size
            full = (answer.num_computed - max(self._mtp_depths - 1, 0)) // size
            while answer.chain_open and len(answer.chain) < full:
                block = answer.blocks[len(answer.chain)]
                entry = self.prefix_cache.register(
                    block, answer.chain, answer.tokens, self._salt(answer), answer.block_keys
                )
                if entry is None:
                    answer.chain_open = False
                else:
                    answer.chain.append(entry)
        if not answer.in_prompt:
            self._let_follow(answer)

    def remove(self, answer: Answer) -> list[int]:
        """Take an answer out that has finished, wherever it is; its blocks are free, or idle for who begins the same.

        Returns the blocks that must be wiped: those that were only its own, after an error.
        """
        self._let_follow(answer)
        if answer in self.running:
            self.running.remove(answer)
        elif answer in self.waiting:
            self.waiting.remove(answer)
        for others in self._held.values():
            if answer in others:
                others.remove(answer)
        spoiled: list[int] = []
        if answer.finish_reason == "error":
            spoiled = [block for block in answer.blocks if self.pool.num_users(block) == 1]
            self.prefix_cache.discard(spoiled)
        self.pool.release(answer.blocks)
        answer.forget_latents()
        return spoiled

    def preempt(self, answer: Answer) -> None:
        """Let a running answer wait again; it will be computed from the start, or from what the prefix cache has."""
        self.running.remove(answer)
        self.pool.release(answer.blocks)
        answer.forget_latents()
        place = sum(other.arrival < answer.arrival for other in self.waiting)
        self.waiting.insert(place, answer)
        self._stats.preemptions += 1

    def check_integrity(self) -> None:
        """Raises AssertionError when blocks, their users and the prefix cache do not add up."""
        self.pool.check_integrity([answer.blocks for answer in self.running])
        self.prefix_cache.check_integrity()
        assert not any(answer.blocks for answer in self.waiting), "a waiting answer has blocks"
        assert not any(answer.finished for answer in [*self.running, *self.waiting]), "a finished answer is still here"

    def _extend(self, answer: Answer, budget: int, spans: dict[Answer, Span]) -> int:
        """Schedule as much of a running answer as there are tokens and blocks for; the rows it took."""
        del answer.drafts[max(budget - _rest(answer), 0) :]
        freed = 0
        while True:
            rows = min(_rest(answer) + len(answer.drafts), budget)
            stop = answer.num_computed + rows
            if self.grow(answer, stop):
                spans[answer] = Span(answer, answer.num_computed, stop)
                return rows - freed
            if answer.drafts:
                answer.drafts.clear()
                continue
            victim = max(self.running, key=lambda other: other.arrival)
            self.preempt(victim)
            span = spans.pop(victim, None)
            freed += span.num_rows if span else 0
            if victim is answer:
                return -freed

    def _admit(self, answer: Answer) -> bool:
        """Give a waiting answer the blocks of its whole known text, or nothing where they are not there."""
        chain = self._cached(answer)
        shared = [entry.block for entry in chain]
        size = self.pool.block_size
        missing = -(-answer.num_tokens // size) - len(shared)
        idle = sum(self.pool.num_users(block) == 0 for block in shared)
        # A block for each that runs already: else the newcomer would soon be sent away again.
        if missing + len(self.running) > self.pool.num_free - idle:
            return False
        self.pool.share(shared)
        blocks = self.pool.allocate(missing, shared[-1] if shared else None)
        assert blocks is not None
        answer.blocks, answer.chain = shared + blocks, chain
        answer.num_computed = answer.num_shared_slots = len(shared) * size
        if answer.request.num_cached_tokens is None:
            answer.request.num_cached_tokens = answer.num_computed
            self._stats.prefix_hit_tokens += answer.num_computed
        return True

    def _cached(self, answer: Answer) -> list:
        """What the prefix cache has of an answer, less what is computed again."""
        request = answer.request
        if not (self._options.prefix_cache or request.params.n > 1):
            return []
        if request.prompt_logprobs is not None and len(request.prompt_logprobs) < len(request.prompt_token_ids):
            return []  # these need the hidden states of the whole prompt
        known = self.prefix_cache.match(answer.tokens, self._salt(answer), answer.block_keys)
        # At least one token is computed, for its logits.
        most = (answer.num_tokens - 1) // self.pool.block_size
        return known[: max(min(len(known) - self._margin, most), 0)]

    def _salt(self, answer: Answer) -> str:
        request = answer.request
        return request.cache_salt if self._options.prefix_cache else f"{request.cache_salt}\0{request.request_id}"

    def _let_follow(self, leader: Answer) -> None:
        for answer in reversed(self._held.pop(leader, ())):
            if not answer.finished:
                self.waiting.appendleft(answer)

    def _missing(self, answer: Answer, num_slots: int) -> int:
        return -(-num_slots // self.pool.block_size) - len(answer.blocks)


def _rest(answer: Answer) -> int:
    """Known tokens that are not computed yet: 1 while an answer decodes."""
    return answer.num_tokens - answer.num_computed
