"""Drafts from the MTP layers (report 2.2 and 5.4.3). In: the hidden states of a step's rows, after its tokens were
chosen. Out: for each answer, the tokens that it may say after its last one; the next step verifies them.

Depth d (from 0) takes, in the row of position p, the hidden state of the depth before at p and the token p + d + 1. So
its rows are true only up to d + 1 places before the last token: the rows after are made with drafts, and again in the
next step, when the tokens are known. Where more drafts are asked for than there are depths, the last depth goes on from
its own output.

Shapes: N rows of a call · D hidden_size · V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fireflyer.infer.model_runner import Batch, ModelRunner
from fireflyer.infer.request import Answer
from fireflyer.infer.scheduler import Scheduler, Span


class Drafter:
    """Writes `drafts` of answers, and the MTP layers' latents of every row.

    Args:
        num_depths: MTP layers to use.
        num_tokens: drafts for an answer at most.
        vocab_size: ids below it may be drafted.
    """

    def __init__(
        self, runner: ModelRunner, scheduler: Scheduler, num_depths: int, num_tokens: int, vocab_size: int
    ) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._num_depths, self._num_tokens, self._vocab_size = num_depths, num_tokens, vocab_size

    def draft(self, batch: Batch, hidden_ND: Tensor) -> None:
        """Draft for all answers of a step. Their `num_computed` is up to date; ended ones still hold their blocks."""
        for span in batch.spans:
            span.answer.drafts = []
        drafting: list[tuple[Answer, int]] = []
        tails: dict[Answer, list[Tensor]] = {span.answer: [] for span in batch.spans}
        for depth in range(self._num_depths):
            if depth:
                batch, hidden_ND = self._shifted(batch, hidden_ND, depth)
            next_ids = [
                _token(span.answer, p + depth + 1) for span in batch.spans for p in range(span.start, span.stop)
            ]
            hidden_ND = self._runner.mtp(depth, batch, hidden_ND, next_ids)
            drafting = [
                (span.answer, first_row + span.answer.num_computed - 1 - span.start)
                for span, first_row in zip(batch.spans, batch.first_rows, strict=True)
                if self._wants(span.answer, depth)
            ]
            self._take_drafts(drafting, hidden_ND)
            for span, first_row in zip(batch.spans, batch.first_rows, strict=True):
                tail = span.answer.num_computed - (depth + 1) - span.start
                if tail >= 0 and depth + 1 < self._num_depths:
                    tails[span.answer].append(hidden_ND[first_row + tail].clone())
        for answer, tail in tails.items():
            answer.mtp_tail = tail
        last_rows = {answer: hidden_ND[row] for answer, row in drafting}
        for step in range(1, self._num_tokens - self._num_depths + 1):
            last_rows = self._go_on(last_rows, step)

    def _wants(self, answer: Answer, num_drafts: int) -> bool:
        """Whether an answer has this many drafts and may have one more."""
        if answer.finished or answer.num_computed != answer.num_tokens - 1 or len(answer.drafts) != num_drafts:
            return False
        # The token after the last draft is said too, so that a draft in the last place would be for nothing.
        return num_drafts < min(self._num_tokens, answer.request.max_new_tokens - answer.num_written - 1)

    def _take_drafts(self, drafting: list[tuple[Answer, int]], hidden_ND: Tensor) -> None:
        if drafting:
            logits_XV = self._runner.logits(hidden_ND[[row for _, row in drafting]])[:, : self._vocab_size]
            for (answer, _), token_id in zip(drafting, logits_XV.max(-1).indices.tolist(), strict=True):
                answer.drafts.append(token_id)

    def _shifted(self, before: Batch, hidden_ND: Tensor, depth: int) -> tuple[Batch, Tensor]:
        """The rows of depth `depth`: one more at the front of each span, which was made with a draft the last time."""
        spans = [
            Span(span.answer, max(span.start - 1, span.answer.num_shared_slots), span.stop) for span in before.spans
        ]
        batch = self._runner.batch(spans)
        had = {
            span.answer: (span.start, hidden_ND[first_row : first_row + span.num_rows])
            for span, first_row in zip(before.spans, before.first_rows, strict=True)
        }
        rows: list[Tensor] = []
        for span in batch.spans:
            start, own_ND = had[span.answer]
            if span.start < start:
                rows.append(span.answer.mtp_tail[depth - 1][None])
            rows.append(own_ND)
        return batch, torch.cat(rows)

    def _go_on(self, last_rows: dict[Answer, Tensor], step: int) -> dict[Answer, Tensor]:
        """One more draft for each answer, from the row after its last one, with the last depth's own output."""
        num_drafts = self._num_depths + step - 1
        spans = []
        for answer in last_rows:
            position = answer.num_computed - 1 + step
            if self._wants(answer, num_drafts) and self._scheduler.grow(answer, position + 1):
                spans.append(Span(answer, position, position + 1))
        if not spans:
            return {}
        batch = self._runner.batch(spans)
        answers = [span.answer for span in batch.spans]
        hidden_ND = torch.stack([last_rows[answer] for answer in answers])
        next_ids = [answer.drafts[-1] for answer in answers]
        hidden_ND = self._runner.mtp(self._num_depths - 1, batch, hidden_ND, next_ids)
        self._take_drafts([(answer, row) for row, answer in enumerate(answers)], hidden_ND)
        return dict(zip(answers, hidden_ND, strict=True))


def _token(answer: Answer, position: int) -> int:
    """A known token, or a draft, or anything: the row is then made again before any other sees it."""
    if position < answer.num_tokens:
        return answer.tokens[position]
    place = position - answer.num_tokens
    return answer.drafts[place] if place < len(answer.drafts) else 0
