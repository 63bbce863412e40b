"""Log-probabilities in OpenAI's two shapes. In: the engine's by token id, the chosen one first. Out: ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fireflyer.infer.logprobs import Logprob
from fireflyer.serve.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from fireflyer.text.stream import StreamDecoder
from fireflyer.text.tokenizer import Tokenizer

TokenLogprobs = Mapping[int, Logprob]


def token_name(tokenizer: Tokenizer | None, token_id: int) -> str:
    """How a token reads; its number where there is no tokenizer."""
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], num_top: int) -> ChatLogprobs:
    """One entry a token: its own, and exactly the `num_top` most probable ones."""
    content = []
    for entry in entries:
        chosen = next(iter(entry))
        top = sorted((each for each in entry.items() if each[1].rank <= num_top), key=lambda each: each[1].rank)
        content.append(
            TokenLogprob(
                token=tokenizer.token_text(chosen),
                logprob=entry[chosen].logprob,
                bytes=list(tokenizer.token_bytes(chosen, skip_special=False)),
                top_logprobs=[
                    TopLogprob(
                        token=tokenizer.token_text(token_id),
                        logprob=each.logprob,
                        bytes=list(tokenizer.token_bytes(token_id, skip_special=False)),
                    )
                    for token_id, each in top
                ],
            )
        )
    return ChatLogprobs(content=content)


class CompletionLogprobsWriter:
    """The log-probabilities of one text, piece by piece: where each token begins depends on those before it.

    `offset` is in characters of the text; a token inside a character begins where that character does.
    """

    def __init__(self, tokenizer: Tokenizer | None, num_top: int) -> None:
        self._tokenizer, self._num_top = tokenizer, num_top
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._offset = 0

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """What these tokens add. An entry is None for the first token of a prompt."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += 0 if self._decoder is None else len(self._decoder.push(token_id))
        return CompletionLogprobs(
            tokens=[token_name(self._tokenizer, token_id) for token_id in token_ids],
            token_logprobs=[
                None if entry is None else entry[token_id].logprob
                for token_id, entry in zip(token_ids, entries, strict=True)
            ],
            top_logprobs=[self._top(entry) for entry in entries] if self._num_top else None,
            text_offset=offsets,
        )

    def _top(self, entry: TokenLogprobs | None) -> dict[str, float] | None:
        """Tokens that read the same share a key: the most probable one's value stands."""
        if entry is None:
            return None
        top: dict[str, float] = {}
        for token_id, each in sorted(entry.items(), key=lambda item: item[1].rank):
            top.setdefault(token_name(self._tokenizer, token_id), each.logprob)
        return top
