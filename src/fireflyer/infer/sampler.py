"""From logits to tokens. In: logits of one position for each row and the rows' sampling parameters. Out: one token a
row. The order is vLLM's: temperature, min-p, top-k, top-p, each on what the one before has left.

Shapes: B rows, V vocabulary, K the most probable of it. Filters are pure functions on (B, V); a row's result depends on
that row alone, so a seeded request draws the same tokens alone and in a crowd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fireflyer.errors import UserError
from fireflyer.infer.sampling_params import SamplingParams

# Nuclei seldom hold more tokens than this, and finding this many is ten times cheaper than sorting 129,280.
_NUCLEUS_WIDTH = 1024


def scale_temperature(logits_BV: Tensor, temperature_B: Tensor) -> Tensor:
    """Logits over temperature, fp32. Temperatures that fp32 can't divide by count as 1e-30 or 1e30: the same choice."""
    return logits_BV.float() / temperature_B.clamp(1e-30, 1e30)[:, None]


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


class Sampler:
    """The parameters of a batch laid out as tensors once; called at every step until the batch changes."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> None:
        sampled = [row for row, row_params in enumerate(params) if not row_params.greedy]
        chosen = [params[row] for row in sampled]
        self.num_sampled = len(sampled)
        self._all = len(sampled) == len(params)
        self._rows = torch.tensor(sampled, dtype=torch.int64, device=device)
        self._temperature = torch.tensor([p.temperature for p in chosen], dtype=torch.float32, device=device)
        self._min_p = _column([p.min_p for p in chosen], 0.0, torch.float32, device)
        self._top_k = _column([max(p.top_k, 0) for p in chosen], 0, torch.int64, device)
        self._top_p = _column([p.top_p for p in chosen], 1.0, torch.float64, device)

    def filtered(self, logits_SV: Tensor) -> Tensor:
        """Logits of the sampled rows after temperature and filters: softmax of it is what is drawn from."""
        logits_SV = scale_temperature(logits_SV, self._temperature)
        if self._min_p is not None:
            logits_SV = filter_min_p(logits_SV, self._min_p)
        if self._top_k is not None:
            logits_SV = filter_top_k(logits_SV, self._top_k)
        if self._top_p is not None:
            logits_SV = filter_top_p(logits_SV, self._top_p)
        return logits_SV

    def __call__(self, logits_BV: Tensor, uniforms: Sequence[float]) -> list[int]:
        """One token for each row. uniforms: one number in [0, 1) for each row that is not greedy, in order.

        Raises UserError when a row has no finite maximum: weights that overflow or are damaged.
        """
        largest_B, token_B = logits_BV.max(-1)
        if not bool(largest_B.isfinite().all()):
            raise UserError(
                "the model's logits are not finite: its weights are damaged, or too large for this dtype; "
                "check the checkpoint, or load it with dtype=torch.float32"
            )
        if self.num_sampled:
            uniform_S = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
            if self._all:
                token_B = draw(self.filtered(logits_BV), uniform_S)
            else:
                token_B[self._rows] = draw(self.filtered(logits_BV[self._rows]), uniform_S)
        return token_B.tolist()


def _column(values: Sequence[float], off: float, dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
    """The values as a tensor, or None where every row has the filter off."""
    if all(value == off for value in values):
        return None
    return torch.tensor(values, dtype=dtype, device=device)
