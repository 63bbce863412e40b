"""Many requests through one decoder. In: requests. Out: after each step, the requests that have a new token.

A step is a prefill of the next waiting prompts, as long as rows are free, or else one token for every running request.
A request that has ended leaves its row at once: the last row takes its place, so nothing is computed for it any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fireflyer.errors import UserError
from fireflyer.infer.model_runner import PREFILL_TOKENS, ModelRunner
from fireflyer.infer.request import Request
from fireflyer.infer.sampler import Sampler
from fireflyer.infer.sampling_state import SampleRow
from fireflyer.model.decoder import Decoder

_FIRST_SLOTS = 512
"""Slots beyond the prompt that a row starts with; rows double when an answer is longer."""


class Engine:
    """Runs `requests` to their ends, at most `max_num_seqs` at once, in the order given."""

    def __init__(self, model: Decoder, requests: Iterable[Request], max_num_seqs: int, sampler: Sampler) -> None:
        self._waiting = deque(requests)
        self._running: list[Request] = []
        self._max_num_seqs = min(max_num_seqs, len(self._waiting))
        self._sampler = sampler
        longest = max(
            (len(r.prompt_token_ids) + min(r.max_new_tokens, _FIRST_SLOTS) for r in self._waiting),
            default=1,
        )
        self._runner = ModelRunner(model, self._max_num_seqs, longest)

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def step(self) -> list[Request]:
        """Give some requests one more token each, and return them."""
        group = self._admit()
        if group:
            logits_BV = self._runner.prefill(len(self._running), [request.prompt_token_ids for request in group])
            self._running.extend(group)
        else:
            group = list(self._running)
            logits_BV = self._runner.decode(
                [request.token_ids[-1] for request in group], [request.num_tokens - 1 for request in group]
            )
        sampled = self._sampler([SampleRow(request.sampling) for request in group], logits_BV)
        for request, token in zip(group, sampled, strict=True):
            if token.error is not None:
                raise UserError(token.error)
            request.accept(token.token_id)
        self._drop_finished()
        return group

    def _admit(self) -> list[Request]:
        """The next waiting requests that fit free rows and one prefill without more padding than prompt."""
        group: list[Request] = []
        longest = tokens = 0
        while self._waiting and len(self._running) + len(group) < self._max_num_seqs:
            length = len(self._waiting[0].prompt_token_ids)
            longest, tokens = max(longest, length), tokens + length
            padded = longest * (len(group) + 1)
            if group and (padded > 2 * tokens or padded > PREFILL_TOKENS):
                break
            group.append(self._waiting.popleft())
        return group

    def _drop_finished(self) -> None:
        for row in range(len(self._running) - 1, -1, -1):
            if self._running[row].finished:
                last = len(self._running) - 1
                if row != last:
                    self._runner.move_row(last, row)
                    self._running[row] = self._running[last]
                self._running.pop()
