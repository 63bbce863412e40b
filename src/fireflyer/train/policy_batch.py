"""Answers and what each was worth, as rows for the model.

In: trials, each a prompt's and an answer's token ids with the old policy's log-probabilities. Out: padded rows of which
only the answers' tokens have a label and a weight; parts of them, each as short as its own longest row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fireflyer.data.packing import NO_LABEL
from fireflyer.train.advantages import token_weights
from fireflyer.train.post_training_settings import LengthRule


@dataclass(frozen=True)
class Trial:
    """One answer to learn from. `counts` is False where it only counts as one of its group (cut off and masked).

    ref_logprobs: the reference's, for the KL; experts: for each token and MoE layer those to force. None without.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    logprobs: list[float]
    advantage: float
    counts: bool = True
    ref_logprobs: list[float] | None = None
    experts: list[list[list[int]]] | None = None


@dataclass(frozen=True)
class PolicyBatch:
    """Rows for the policy: (B, T) unless said otherwise; where `labels_BT` is NO_LABEL the rest means nothing.

    experts_BTLK: for each row and MoE layer the experts to force, -1 for free choice; None where none are forced.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    old_logprobs_BT: Tensor
    ref_logprobs_BT: Tensor | None
    advantages_BT: Tensor
    weights_BT: Tensor
    experts_BTLK: Tensor | None
    real_BT: Tensor
    """True for tokens of prompts and answers, False for padding."""

    @property
    def num_rows(self) -> int:
        return self.input_ids_BT.shape[0]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that have a label."""
        return int((self.labels_BT != NO_LABEL).sum())

    def parts(self, rows: int, device: str) -> Iterator[PolicyBatch]:
        """Parts of at most `rows` rows on `device`, each cut to its own longest row."""
        for start in range(0, self.num_rows, rows):
            some = slice(start, start + rows)
            part = some, slice(0, int(self.real_BT[some].sum(1).max()))
            yield PolicyBatch(
                self.input_ids_BT[part].to(device),
                self.labels_BT[part].to(device),
                self.old_logprobs_BT[part].to(device),
                None if self.ref_logprobs_BT is None else self.ref_logprobs_BT[part].to(device),
                self.advantages_BT[part].to(device),
                self.weights_BT[part].to(device),
                None if self.experts_BTLK is None else self.experts_BTLK[part].to(device),
                self.real_BT[part].to(device),
            )


def collate(trials: Sequence[Trial], *, pad_id: int, length_rule: LengthRule, max_tokens: int) -> PolicyBatch:
    """One batch, the longest rows first, so that parts of it have rows of about one length."""
    trials = sorted(trials, key=lambda trial: len(trial.prompt_ids) + len(trial.answer_ids), reverse=True)
    lengths_B = torch.tensor([len(trial.answer_ids) if trial.counts else 0 for trial in trials])
    weights_B = token_weights(lengths_B, length_rule, max_tokens)
    width = len(trials[0].prompt_ids) + len(trials[0].answer_ids) - 1
    ids_BT = torch.full((len(trials), width), pad_id)
    real_BT = torch.zeros(ids_BT.shape, dtype=torch.bool)
    labels_BT = torch.full_like(ids_BT, NO_LABEL)
    old_BT, advantages_BT, weights_BT = (torch.zeros(ids_BT.shape) for _ in range(3))
    ref_BT = None if trials[0].ref_logprobs is None else torch.zeros(ids_BT.shape)
    experts_BTLK = None
    if trials[0].experts is not None:
        experts_BTLK = torch.full((*ids_BT.shape, *torch.tensor(trials[0].experts[0]).shape), -1)
    for row, trial in enumerate(trials):
        ids = [*trial.prompt_ids, *trial.answer_ids]
        ids_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        real_BT[row, : len(ids) - 1] = True
        # The row of the prompt's last token gives the answer's first.
        answer = slice(len(trial.prompt_ids) - 1, len(ids) - 1)
        if trial.counts:
            labels_BT[row, answer] = torch.tensor(trial.answer_ids)
        old_BT[row, answer] = torch.tensor(trial.logprobs)
        advantages_BT[row, answer] = trial.advantage
        weights_BT[row, answer] = float(weights_B[row])
        if ref_BT is not None and trial.ref_logprobs is not None:
            ref_BT[row, answer] = torch.tensor(trial.ref_logprobs)
        if experts_BTLK is not None and trial.experts is not None:
            experts_BTLK[row, answer] = torch.tensor(trial.experts)
    return PolicyBatch(ids_BT, labels_BT, old_BT, ref_BT, advantages_BT, weights_BT, experts_BTLK, real_BT)
