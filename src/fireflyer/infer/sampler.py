"""From logits to tokens. In: rows of logits, and whose they are. Out: one token a row.

The order is vLLM's: min_tokens, logit_bias, penalties, and the grammar; then, for rows that are drawn, temperature,
min-p, top-k, top-p, each on what the one before has left. A row's result is a function of its logits, its request's
parameters and history and the number drawn for its position, and of no other row: a request has the same tokens alone
and in a crowd, with speculation and without.

Shapes: B or R rows, X those that need more than a maximum, S those that are drawn; V tokens that may be sampled,
M the model's whole vocabulary, K the most probable ones.
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

_DRAWN_AT_ONCE = 2**17
"""Probabilities that are looked at together."""

_NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for this dtype; "
    "check the checkpoint, or load it with dtype=torch.float32"
)


def scale_temperature(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Logits over temperature, fp32, shifted so that each row's largest is 0: however cold, no row overflows.

    Temperatures that fp32 can't divide by count as 1e-30 or 1e30: the same choice.
    """
    logits_BV = logits_BV.float()
    return (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(temperature_B.clamp(1e-30, 1e30)[:, None])


def num_kept(falling_BK: Tensor, mass_BK: Tensor, min_p_B: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """How many of each row's most probable tokens the filters keep, at least one. int64 (B,).

    falling_BK: the largest probabilities of each row, falling, and mass_BK their running sums in fp64; all that top_k
    keeps must be among them. min-p keeps what is at least min_p times as probable as the first (arXiv 2407.01082);
    top-k, of these, the first top_k (0: all); top-p, of these, the fewest that make up top_p of their sum
    (arXiv 1904.09751).
    """
    kept_B = torch.searchsorted(-falling_BK, -(falling_BK[:, 0] * min_p_B)[:, None], right=True)[:, 0]
    kept_B = torch.where(top_k_B > 0, torch.minimum(kept_B, top_k_B), kept_B)
    wanted_B1 = mass_BK.gather(-1, kept_B[:, None] - 1) * top_p_B[:, None]
    nucleus_B = torch.searchsorted(mass_BK, wanted_B1)[:, 0] + 1
    return torch.where(top_p_B < 1, torch.minimum(kept_B, nucleus_B), kept_B)


def draw(probabilities_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One token a row by inverting the row's distribution at uniform_B (fp64, in [0, 1)). int64 (B,).

    One number a row, so what a request draws does not depend on the vocabulary or the batch. The sums are fp64: next to
    1, fp32 has no room for tokens rarer than 6e-8, and a large vocabulary has many.
    """
    mass_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    return _invert(mass_BV, mass_BV[:, -1], uniform_B)


def draw_filtered(probabilities_BV: Tensor, params: Sequence[SamplingParams], uniform_B: Tensor) -> Tensor:
    """As `draw`, from what min_p, top_k and top_p leave. Of equally probable tokens the lower ids come first."""
    device = probabilities_BV.device
    vocab_size = probabilities_BV.shape[-1]
    counts = [min(p.top_k, vocab_size) if p.top_k > 0 else 0 for p in params]
    falling_BK = _falling(probabilities_BV, vocab_size if 0 in counts else max(counts))
    mass_BK = falling_BK.cumsum(-1, dtype=torch.float64)
    kept_B = num_kept(
        falling_BK,
        mass_BK,
        torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
        torch.tensor(counts, device=device),
        torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
    )
    place_B1 = _invert(mass_BK, mass_BK.gather(-1, kept_B[:, None] - 1)[:, 0], uniform_B)[:, None]
    # From the place among the most probable ones back to the token: the one of its probability, or one of several.
    value_B1 = falling_BK.gather(-1, place_B1)
    nth_B1 = place_B1 - torch.searchsorted(-falling_BK, -value_B1)
    row_N, token_N = (probabilities_BV == value_B1).nonzero(as_tuple=True)
    num_equal_B = torch.bincount(row_N, minlength=len(params))
    return token_N[num_equal_B.cumsum(0) - num_equal_B + nth_B1[:, 0]]


def _invert(mass_BK: Tensor, total_B: Tensor, uniform_B: Tensor) -> Tensor:
    """Where the running sums of each row pass uniform_B of `total_B`; never at a place that adds nothing."""
    # A number below 1 is below it by 2**-53 at least, so the product never rounds up to the total.
    return torch.searchsorted(mass_BK, (uniform_B * total_B)[:, None], right=True)[:, 0]


def _falling(values_BV: Tensor, count: int) -> Tensor:
    """(B, count): the largest values of each row, falling."""
    if count < values_BV.shape[-1] or values_BV.device.type != "cpu":
        return values_BV.topk(count, dim=-1).values
    # numpy sorts a large vocabulary thirty times as fast as torch does on a CPU.
    return torch.from_numpy(np.sort(values_BV.numpy(), axis=-1)[:, ::-1].copy())


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
        largest, tokens = largest_R.tolist(), token_R.tolist()
        errors = {row: _NOT_FINITE for row, value in enumerate(largest) if not math.isfinite(value)}
        special = [
            index
            for index, row in enumerate(rows)
            if (row.state.shaped or not row.state.params.greedy) and index not in errors
        ]
        if special:
            logits_XM = logits_RM if len(special) == len(rows) else logits_RM[special]
            chosen, failed = self._choose([rows[index] for index in special], logits_XM)
            errors |= {special[row]: error for row, error in failed.items()}
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
        tokens = logits_XV.max(-1).indices.tolist()
        drawn = [index for index, row in enumerate(rows) if not row.state.params.greedy and index not in errors]
        # Row by row where rows are long: what a row needs then stays in the processor's cache.
        at_once = max(_DRAWN_AT_ONCE // self._vocab_size, 1)
        for filtered in (False, True):
            part = [index for index in drawn if rows[index].state.params.filtered == filtered]
            for start in range(0, len(part), at_once):
                some = part[start : start + at_once]
                found = _draw([rows[index] for index in some], logits_XV[some])
                for index, token_id in zip(some, found.tolist(), strict=True):
                    tokens[index] = token_id
        return tokens, errors

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


def _draw(rows: Sequence[SampleRow], logits_SV: Tensor) -> Tensor:
    """Tokens for rows that all have a filter, or all have none."""
    device = logits_SV.device
    params = [row.state.params for row in rows]
    temperature_S = torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device)
    uniforms = [row.state.uniform(row.position) for row in rows]
    uniform_S = torch.tensor(uniforms, dtype=torch.float64, device=device)
    probabilities_SV = scale_temperature(logits_SV, temperature_S).softmax(-1)
    return (
        draw_filtered(probabilities_SV, params, uniform_S) if params[0].filtered else draw(probabilities_SV, uniform_S)
    )
