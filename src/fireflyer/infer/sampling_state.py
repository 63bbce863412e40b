"""What the sampler remembers of one request: its parameters, the tokens it has accepted, its random stream.

In: accepted tokens, one by one. Out, for the sampler: the history of a row, which is the accepted tokens and, where a
draft is being verified, the drafts before that row. Only `commit` changes anything, so drafts that are refused leave no
trace, and a request that was preempted goes on where it was.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from fireflyer.errors import UserError
from fireflyer.infer.penalties import TokenCounts
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.structured_output import GrammarState

_WORD = 2**64


class SamplingState:
    """Sampling of one answer.

    Args:
        params: what the request asked for.
        prompt_token_ids: for the repetition penalty.
        end_token_ids: what min_tokens keeps away, beside the request's stop_token_ids.
        choice: which of the prompt's n answers this is; each draws from a stream of its own.
        grammar: what the answer is held to; one for each answer.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int] = (),
        end_token_ids: frozenset[int] = frozenset(),
        choice: int = 0,
        grammar: GrammarState | None = None,
    ) -> None:
        self.params = params
        if params.response_format is not None and grammar is None:
            raise UserError("response_format can't be used here: no grammar was made for it")
        self.num_tokens = 0
        self.grammar = grammar
        # Of the three penalties only that of repetition looks at the prompt.
        counted = prompt_token_ids if params.repetition_penalty != 1 else ()
        self.counts = TokenCounts(counted) if params.penalized else None
        self.forbidden_early = sorted(end_token_ids | set(params.stop_token_ids or ())) if params.min_tokens else []
        seed = secrets.randbits(64) if params.seed is None else params.seed % _WORD
        self._stream = hashlib.blake2b(choice.to_bytes(8, "little"), key=seed.to_bytes(8, "little"), digest_size=8)
        # Whether anything but the model itself moves the logits.
        self.shaped = bool(params.penalized or params.logit_bias or params.min_tokens or grammar)

    def uniform(self, position: int) -> float:
        """The number in [0, 1) that draws the answer's token `position`, whenever and however often it is asked for.

        A keyed hash of the position instead of a generator that moves on: a token drawn again, after a refused draft or
        a preemption, is drawn with the same number.
        """
        stream = self._stream.copy()
        stream.update(position.to_bytes(8, "little"))
        return (int.from_bytes(stream.digest(), "little") >> 11) * 2.0**-53

    def commit(self, token_id: int) -> None:
        """Accept a token of the answer."""
        self.num_tokens += 1
        if self.counts is not None:
            self.counts.add(token_id)
        if self.grammar is not None:
            self.grammar.commit(token_id)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of logits: the position after the accepted tokens of `state` and after `extra_tokens`, drafts that are
    only supposed."""

    state: SamplingState
    extra_tokens: tuple[int, ...] = ()

    @property
    def position(self) -> int:
        """Index in the answer of the token that this row gives."""
        return self.state.num_tokens + len(self.extra_tokens)
