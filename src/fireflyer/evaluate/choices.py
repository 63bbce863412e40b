"""How probable a model finds each of several continuations: multiple choice, and text as a whole.

In: token ids. Out: natural logarithms, by one forward over what has not been read before: the latents of a context are
kept, so that its choices, and the next question with the same examples before it, are read from there on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fireflyer.model.cache import ContiguousCache
from fireflyer.model.decoder import Decoder
from fireflyer.text.tokenizer import Tokenizer

_ROWS = 16
_CHUNK_ELEMENTS = 1 << 22


class ContinuationScorer:
    """Log-likelihoods of continuations; remembers the latents of the last context."""

    def __init__(self, model: Decoder, max_length: int) -> None:
        """max_length: of a context and its continuation together."""
        self._model, self.max_length = model, max_length
        self._held: list[int] = []
        self._cache: ContiguousCache | None = None

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """The sum of log-probabilities of each continuation's tokens after the context (at least one token).

        A context that is too long loses its beginning, all but the first token.
        """
        longest = max(map(len, continuations))
        context = list(context)
        room = self.max_length - longest
        if len(context) > room:
            context = [context[0], *context[len(context) - room + 1 :]]
        shared = self._read(context[:-1])
        # The last token of a continuation predicts nothing that is asked for.
        inputs = [(context[-1], *continuation[:-1]) for continuation in continuations]
        distinct = list(dict.fromkeys(inputs))
        totals = [0.0] * len(continuations)
        for start in range(0, len(distinct), _ROWS):
            rows = distinct[start : start + _ROWS]
            hidden_BTD = self._hidden(shared, len(context) - 1, rows)
            for index, (row, continuation) in enumerate(zip(inputs, continuations, strict=True)):
                if row in rows:
                    hidden_TD = hidden_BTD[rows.index(row), : len(row)]
                    totals[index] = label_logprobs(self._model, hidden_TD, torch.tensor(continuation)).sum().item()
        return totals

    def _read(self, tokens: list[int]) -> ContiguousCache:
        """The cache with exactly these tokens in it."""
        model = self._model
        if self._cache is None:
            self._cache = ContiguousCache(model.config, 1, self.max_length, model.dtype, model.device)
        common = 0
        while common < min(len(tokens), len(self._held)) and tokens[common] == self._held[common]:
            common += 1
        self._held = self._held[:common]  # until the rest is there, that is all it holds
        self._cache.lengths.fill_(common)
        if common < len(tokens):
            model.trunk(torch.tensor([tokens[common:]], device=model.device), cache=self._cache, num_mtp=0)
        self._held = tokens
        return self._cache

    def _hidden(self, shared: ContiguousCache, length: int, rows: Sequence[Sequence[int]]) -> Tensor:
        """Of rows of tokens that go on after the first `length` slots; padded at the right, which no token before
        sees."""
        model, width = self._model, max(map(len, rows))
        cache = ContiguousCache(model.config, len(rows), length + width, model.dtype, model.device)
        cache.slots[:, :, :length] = shared.slots[:, :, :length]
        cache.lengths.fill_(length)
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
        return model.trunk(padded, cache=cache, num_mtp=0).hidden_BTD


def label_logprobs(model: Decoder, hidden_TD: Tensor, labels_T: Tensor) -> Tensor:
    """(T,) float32: what the model gives each label; in chunks, since logits of a large vocabulary are the largest."""
    step = max(1, _CHUNK_ELEMENTS // model.config.vocab_size)
    labels_T = labels_T.to(hidden_TD.device)
    parts = [
        model.head(hidden_TD[start : start + step])
        .float()
        .log_softmax(-1)
        .gather(-1, labels_T[start : start + step, None])[:, 0]
        for start in range(0, len(labels_T), step)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def document_logprob(model: Decoder, tokens: Sequence[int], first: int, window: int) -> float:
    """The log-likelihood of a document's tokens, read in windows of `window` that overlap by half, so that every token
    but those of the first window has at least half a window before it. first: the begin token, not scored."""
    ids = [first, *tokens]
    total, scored = 0.0, 1
    while scored < len(ids):
        begin = max(0, scored - max(1, window // 2))
        piece = ids[begin : begin + window + 1]
        hidden_TD = model.trunk(torch.tensor([piece[:-1]], device=model.device), num_mtp=0).hidden_BTD[0]
        new = scored - begin
        total += label_logprobs(model, hidden_TD[new - 1 :], torch.tensor(piece[new:])).sum().item()
        scored = begin + len(piece)
    return total


def encode_continuation(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of both, cut where the context ends, as a whole text would be: spaces at the context's end go with the
    continuation, since tokens begin with them. The context begins with the begin token."""
    kept = context.rstrip(" ")
    continuation = context[len(kept) :] + continuation
    before, whole = tokenizer.encode(kept), tokenizer.encode(kept + continuation)
    if whole[: len(before)] != before or len(whole) == len(before):  # they grow together: encoded apart instead
        whole = [*before, *tokenizer.encode(continuation)]
    return [tokenizer.bos_id, *before], whole[len(before) :]
