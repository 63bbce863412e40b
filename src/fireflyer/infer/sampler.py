"""From logits to tokens. In: rows of logits, and whose they are. Out: one token a row.

The order is vLLM's: min_tokens, logit_bias, penalties, and the grammar; then, for rows that are drawn, temperature,
min-p, top-k, top-p, each on what the one before has left. A row's result is a function of its logits, its request's
parameters and history and the number drawn for its position, and of no other row: a request has the same tokens alone
and in a crowd, with speculation and without.

Shapes: B or R rows, X those that need more than a maximum, S those that are drawn; V tokens that may be sampled,
M the model's whole vocabulary, K the most probable ones. Filters are pure functions on (B, V).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fireflyer.infer.logprobs import Logprob, token_logprobs
from fireflyer.infer.penalties import PenaltyRow, penalize_
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SampleRow
from fireflyer.text.tokenizer import Tokenizer

# Nuclei seldom hold more tokens than this, and finding this many is ten times cheaper than sorting 129,280.
_NUCLEUS_WIDTH = 1024

_NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for this dtype; "
    "check the checkpoint, or load it with dtype=torch.float32"
)


def scale_temperature(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Logits over temperature, fp32, shifted so that each row's largest is 0: however cold, no row overflows.

    Temperatures that fp32 can't divide by count as 1e-30 or 1e30: the same choice.
    """
    logits_BV = logits_BV.float()
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B.clamp(1e-30, 1e30)[:, None]


def filter_min_p(logits_BV: Tensor, min_p_B: Tensor) -> Tensor:
    """-inf where a token is less probable than min_p times the row's most probable one (arXiv 2407.01082)."""
    floor_B1 = logits_BV.amax(-1, keepdim=True) + min_p_B.log()[:, None]
    return logits_BV.masked_fill(logits_BV < floor_B1, -torch.inf)


def filter_top_k(logits_BV: Tensor, top_k_B: Tensor) -> Tensor:
    """-inf for all but the top_k largest logits of each row; of equal ones the lower token ids stay. 0 or less: off."""
    vocab_size = logits_BV.shape[-1]
    top_k_B = top_k_B.clamp(max=vocab_size)
    off_B1 = top_k_B[:, None] <= 0
    largest_BK = logits_BV.topk(max(int(top_k_B.max()), 1), dim=-1).values
    kept_BV = _largest(logits_BV, largest_BK, top_k_B.clamp(min=1)) | off_B1
    return logits_BV.masked_fill(~kept_BV, -torch.inf)


def filter_top_p(logits_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """-inf outside each row's nucleus: the fewest most probable tokens whose probabilities reach top_p, at least one.

    Of equally probable tokens the lower ids are taken first. Source: arXiv 1904.09751.
    """
    probabilities_BV = logits_BV.softmax(-1, dtype=torch.float32)
    vocab_size = logits_BV.shape[-1]
    for width in (min(_NUCLEUS_WIDTH, vocab_size), vocab_size):
        largest_BK = probabilities_BV.topk(width, dim=-1).values
        mass_BK = largest_BK.double().cumsum(-1)
        reached_B = (mass_BK[:, -1] >= top_p_B) | (top_p_B >= 1)
        if width == vocab_size or bool(reached_B.all()):
            break
    before_BK = mass_BK - largest_BK
    nucleus_B = (before_BK < top_p_B[:, None]).sum(-1).clamp(min=1)
    kept_BV = _largest(probabilities_BV, largest_BK, nucleus_B) | (top_p_B >= 1)[:, None]
    return logits_BV.masked_fill(~kept_BV, -torch.inf)


def _largest(values_BV: Tensor, largest_BK: Tensor, count_B: Tensor) -> Tensor:
    """A mask (B, V) of exactly count_B largest values a row, ties to lower ids. largest_BK: the row's largest, falling.

    Found by value and not by topk's indices, whose order among equals depends on K.
    """
    last_B1 = largest_BK.gather(-1, count_B[:, None] - 1)
    above_BV = values_BV > last_B1
    equal_BV = values_BV == last_B1
    room_B1 = count_B[:, None] - above_BV.sum(-1, keepdim=True)
    return above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))


def draw(logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row by inverting the row's distribution at uniform_B (fp64, in [0, 1)). int64 (B,).

    One number a row, so a request's random stream moves by one a token whatever the vocabulary or the batch. The sums
    are fp64: next to 1, fp32 has no room for tokens rarer than 6e-8, and a large vocabulary has many.
    """
    cumulative_BV = logits_BV.softmax(-1, dtype=torch.float32).double().cumsum(-1)
    points_B1 = (uniform_B * cumulative_BV[:, -1])[:, None]
    return torch.searchsorted(cumulative_BV, points_B1, right=True)[:, 0]


class SampledToken(NamedTuple):
    """What one row gave. `error` (then token_id is -1) ends that request alone: the others have their tokens."""

    token_id: int
    logprobs: dict[int, Logprob] | None = None
    error: str | None = None


class Sampler:
    """Tokens for rows of any requests, whichever are in the batch. It holds nothing of any request.

    Args:
        vocab_size: ids below it may be sampled; rows of logits are longer where a model's vocabulary is padded.
        tokenizer: for the text of tokens in log-probabilities.
    """

    def __init__(self, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        self._vocab_size = vocab_size
        self._tokenizer = tokenizer

    def __call__(self, rows: Sequence[SampleRow], logits_RM: Tensor) -> list[SampledToken]:
        """One token for each row of logits; a row's result depends on that row alone.

        The rows of one request may be several, each with more of its drafts as `extra_tokens`: a draft is right if it
        is the token of the row before it. Nothing is remembered: `SamplingState.commit` what was accepted.
        """
        logits_RV = logits_RM[:, : self._vocab_size]
        # max and not argmax, which takes three times as long on a CPU.
        largest_R, token_R = logits_RV.max(-1)
        special = [index for index, row in enumerate(rows) if row.state.shaped or not row.state.params.greedy]
        largest, tokens = largest_R.tolist(), token_R.tolist()
        errors = {row: _NOT_FINITE for row, value in enumerate(largest) if not math.isfinite(value)}
        if special:
            logits_XM = logits_RM if len(special) == len(rows) else logits_RM[special]
            chosen, failed = self._choose([rows[index] for index in special], logits_XM)
            errors = {special[row]: error for row, error in failed.items()} | errors
            for index, token_id in zip(special, chosen, strict=True):
                tokens[index] = token_id
        logprobs = self._logprobs(rows, logits_RM, tokens, errors)
        return [
            SampledToken(-1, error=errors[row]) if row in errors else SampledToken(token_id, logprobs.get(row))
            for row, token_id in enumerate(tokens)
        ]

    def prompt_logprobs(self, logits_TM: Tensor, token_ids: Sequence[int], num_top: int) -> list[dict[int, Logprob]]:
        """Log-probabilities of prompt tokens: row t of the logits is what the model expected at token_ids[t]."""
        return token_logprobs(logits_TM, token_ids, [num_top] * len(token_ids), self._vocab_size, self._tokenizer)

    def _choose(self, rows: Sequence[SampleRow], logits_XM: Tensor) -> tuple[list[int], dict[int, str]]:
        """(tokens, errors by row) of rows that take more than the largest of the model's logits."""
        errors: dict[int, str] = {}
        if any(row.state.shaped for row in rows):
            logits_XM = logits_XM.to(torch.float32, copy=True)
            _shape_(logits_XM, rows)
            errors = _forbid_(logits_XM[:, : self._vocab_size], rows)
        logits_XV = logits_XM[:, : self._vocab_size]
        token_X = logits_XV.max(-1).indices
        drawn = [index for index, row in enumerate(rows) if not row.state.params.greedy]
        if drawn:
            logits_SV = logits_XV if len(drawn) == len(rows) else logits_XV[drawn]
            params = [rows[index].state.params for index in drawn]
            uniforms = [rows[index].state.uniform(rows[index].position) for index in drawn]
            uniform_S = torch.tensor(uniforms, dtype=torch.float64, device=logits_XV.device)
            token_X[drawn] = draw(filtered(logits_SV, params), uniform_S)
        return token_X.tolist(), errors

    def _logprobs(
        self, rows: Sequence[SampleRow], logits_RM: Tensor, tokens: list[int], errors: dict[int, str]
    ) -> dict[int, dict[int, Logprob]]:
        asked = [
            (index, row.state.params.logprobs)
            for index, row in enumerate(rows)
            if row.state.params.logprobs is not None and index not in errors
        ]
        if not asked:
            return {}
        indices = [index for index, _ in asked]
        chosen = [tokens[index] for index in indices]
        num_top = [count for _, count in asked]
        found = token_logprobs(logits_RM[indices], chosen, num_top, self._vocab_size, self._tokenizer)
        return dict(zip(indices, found, strict=True))


def _shape_(logits_XM: Tensor, rows: Sequence[SampleRow]) -> None:
    """min_tokens, biases and penalties, in vLLM's order, in place and only at the tokens that they name."""
    places: list[tuple[int, int]] = []
    biases: list[float] = []
    penalties: list[PenaltyRow] = []
    for index, row in enumerate(rows):
        state = row.state
        if not state.shaped:
            continue
        if row.position < state.params.min_tokens:
            early = [token for token in state.forbidden_early if token < logits_XM.shape[-1]]
            logits_XM[index, early] = -torch.inf
        places += [(index, token) for token in state.params.logit_bias or ()]
        biases += (state.params.logit_bias or {}).values()
        if state.counts is not None:
            penalties.append(PenaltyRow(index, state.params, *state.counts.with_extra(row.extra_tokens)))
    if places:
        index_N, token_N = torch.tensor(places, device=logits_XM.device).unbind(-1)
        logits_XM[index_N, token_N] += torch.tensor(biases, device=logits_XM.device)
    if penalties:
        penalize_(logits_XM, penalties)


def _forbid_(logits_XV: Tensor, rows: Sequence[SampleRow]) -> dict[int, str]:
    """-inf in place where a grammar allows no token; errors by row."""
    held = [index for index, row in enumerate(rows) if row.state.grammar is not None]
    if not held:
        return {}
    vocab_size = logits_XV.shape[-1]
    words_NW = np.empty((len(held), (vocab_size + 31) // 32), dtype=np.uint32)
    errors: list[str | None] = []
    for grammar, group in itertools.groupby((rows[index] for index in held), key=lambda row: row.state.grammar):
        assert grammar is not None
        histories = [row.extra_tokens for row in group]
        errors += grammar.fill(words_NW[len(errors) : len(errors) + len(histories)], histories)
    bits_NV = np.unpackbits(words_NW.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    forbidden_NV = torch.from_numpy(bits_NV).to(logits_XV.device) == 0
    logits_XV[held] = logits_XV[held].masked_fill(forbidden_NV, -torch.inf)
    return {index: error for index, error in zip(held, errors, strict=True) if error is not None}


def filtered(logits_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits after temperature and filters: a softmax of it is what is drawn from."""
    device = logits_SV.device
    temperature_S = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)
    logits_SV = scale_temperature(logits_SV, temperature_S)
    min_p_S = _column([p.min_p for p in params], 0.0, torch.float32, device)
    if min_p_S is not None:
        logits_SV = filter_min_p(logits_SV, min_p_S)
    # A count beyond every vocabulary keeps all, and may be beyond what a tensor holds.
    top_k_S = _column([min(max(p.top_k, 0), logits_SV.shape[-1]) for p in params], 0, torch.int64, device)
    if top_k_S is not None:
        logits_SV = filter_top_k(logits_SV, top_k_S)
    top_p_S = _column([p.top_p for p in params], 1.0, torch.float64, device)
    if top_p_S is not None:
        logits_SV = filter_top_p(logits_SV, top_p_S)
    return logits_SV


def _column(values: Sequence[float], off: float, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The values as a tensor, or None where every row has the filter off."""
    if all(value == off for value in values):
        return None
    return torch.tensor(values, dtype=dtype, device=device)
