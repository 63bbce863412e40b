"""How many sequences each step takes while the batch grows, and so how many steps a run has: whole numbers, no torch.

The batch is linear in the tokens seen, from `start` at 0 to `end` at `ramp_tokens`, rounded to the nearest multiple of
`multiple` (halves up). V3 (report 4.2: 3072 to 15360 sequences over the first 469B tokens) gets 15.0K steps of ramp
from it, and 227.8K after.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class BatchRamp:
    """Batch sizes in sequences of `seq_len` tokens; without a ramp `start` is `end` and `ramp_tokens` 0."""

    start: int
    end: int
    ramp_tokens: int
    multiple: int
    seq_len: int

    def batch_size_at(self, tokens: int) -> int:
        """Sequences of the step that begins when `tokens` have been seen."""
        if tokens >= self.ramp_tokens:
            return self.end
        return self.start + self._multiples_added(tokens) * self.multiple

    def seq_len_at(self, tokens: int) -> int:
        """Their length."""
        return self.seq_len

    @property
    def mean_seq_len(self) -> float:
        """Of a token."""
        return self.seq_len

    def tokens_after(self, steps: int) -> int:
        """Tokens seen when so many steps are done."""
        plateaus = _plateaus(self)
        plateau = plateaus[bisect_right(plateaus, steps, key=lambda each: each.step) - 1]
        return plateau.tokens + (steps - plateau.step) * plateau.batch_size * self.seq_len

    def steps_to(self, tokens: int) -> int:
        """The fewest steps after which `tokens` or more have been seen."""
        plateaus = _plateaus(self)
        plateau = plateaus[bisect_right(plateaus, tokens, key=lambda each: each.tokens) - 1]
        return plateau.step + -(-(tokens - plateau.tokens) // (plateau.batch_size * self.seq_len))

    def _multiples_added(self, tokens: int) -> int:
        grown = self.end - self.start
        return (2 * grown * tokens + self.ramp_tokens * self.multiple) // (2 * self.ramp_tokens * self.multiple)

    def first_tokens_with(self, multiples_added: int) -> int:
        """The token count at which the batch has grown by so many multiples (at least 1)."""
        grown = self.end - self.start
        return -(-self.ramp_tokens * self.multiple * (2 * multiples_added - 1) // (2 * grown))


@dataclass(frozen=True)
class _Plateau:
    """From `step` on, begun at `tokens`, every step takes `batch_size` sequences."""

    step: int
    tokens: int
    batch_size: int


@lru_cache(maxsize=16)
def _plateaus(ramp: BatchRamp) -> tuple[_Plateau, ...]:
    plateaus = [_Plateau(0, 0, ramp.batch_size_at(0))]
    while (now := plateaus[-1]).batch_size < ramp.end:
        grows_at = ramp.first_tokens_with((now.batch_size - ramp.start) // ramp.multiple + 1)
        steps = -(-(grows_at - now.tokens) // (now.batch_size * ramp.seq_len))
        tokens = now.tokens + steps * now.batch_size * ramp.seq_len
        plateaus.append(_Plateau(now.step + steps, tokens, ramp.batch_size_at(tokens)))
    return tuple(plateaus)
