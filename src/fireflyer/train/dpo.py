"""DPO as an objective: pairs of answers, learnt against the checkpoint that the run began from.

The reference's log-probabilities are computed once, written into the run's folder, and read from there ever after.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fireflyer.checkpoint.hf import load_model
from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import writing
from fireflyer.data.chats import pad_token
from fireflyer.data.packing import Batch
from fireflyer.data.preferences import (
    Pair,
    PairBatch,
    PairLoader,
    pair_rows,
    read_pairs,
    split_pairs,
    to_device,
    trimmed,
)
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.train.events import Event, Notice
from fireflyer.train.objective import Evaluation, Part, Trunk
from fireflyer.train.post_training_settings import DpoSettings
from fireflyer.train.precision import autocast
from fireflyer.train.preference_loss import PreferenceTerms, answer_logprobs, preference_terms
from fireflyer.train.pretraining import without_padding
from fireflyer.train.recipe import take_stored_choices, with_epoch_tokens
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import Inputs, choose
from fireflyer.train.sft import check_post_training, taught_tokenizer

REFERENCE = "reference.json"

Logprobs = list[list[float]]
"""Of each pair, chosen and rejected, by the reference."""


def open_preferences(recipe: Recipe, run_dir: Path, stored: Recipe | None, on_event: Callable[[Event], None]) -> Inputs:
    """Everything that DPO reads, checked; writes nothing. Raises UserError."""
    recipe = choose(recipe if stored is None else take_stored_choices(recipe, stored))
    check_post_training(recipe, "dpo")
    tokenizer = taught_tokenizer(recipe, run_dir)
    pairs, fingerprint = read_pairs(recipe.data.sources, tokenizer, recipe.seq_len)
    held: list[Pair] = []
    if recipe.eval_every and recipe.eval_data is not None:
        held, more = read_pairs(recipe.eval_data, tokenizer, recipe.seq_len)
        fingerprint = [*fingerprint, *more]
    elif recipe.eval_every:
        pairs, held = split_pairs(pairs, recipe.data.held_out, recipe.seed)
    if not pairs:
        raise UserError(
            f"{recipe.data.sources[0]}: one pair is all there is, and evaluation holds it out; add pairs, or --set"
            " eval_every=0"
        )
    held = held[: recipe.eval_rows]
    pad_id = pad_token(tokenizer)
    recipe = with_epoch_tokens(recipe, len(pairs) * recipe.seq_len)

    def objective(model: Decoder) -> Preferences:
        reference = _reference(recipe, [*pairs, *held], fingerprint, pad_id, run_dir, on_event)
        loader = PairLoader(pairs, fingerprint, seq_len=recipe.seq_len, seed=recipe.seed, pad_id=pad_id)
        return Preferences(recipe, model, loader, held, reference, pad_id)

    return Inputs(recipe, tokenizer, objective)


class Preferences:
    """An `Objective` over pairs. `reference`: of the pairs to train on, then of those held out."""

    watches_loss = False

    def __init__(
        self,
        recipe: Recipe,
        model: Decoder,
        loader: PairLoader,
        held: Sequence[Pair],
        reference: Logprobs,
        pad_id: int,
    ) -> None:
        self._recipe, self._model = recipe, model
        self._settings = recipe.dpo or DpoSettings()
        self._loader, self._held, self._pad_id = loader, held, pad_id
        self._reference = torch.tensor(reference, dtype=torch.float64)

    @property
    def epoch(self) -> int:
        return self._loader.epoch

    def next_batch(self, batch_size: int) -> PairBatch:
        return self._loader.next_batch(batch_size)

    def size(self, batch: PairBatch) -> tuple[int, int]:
        """A pair takes a row of seq_len, as the schedule counts it."""
        return batch.rows.input_ids_BT.shape[0], batch.rows.input_ids_BT.numel()

    def parts(self, batch: PairBatch, trunk: Trunk, tokens: int) -> Iterator[Part]:
        recipe, count = self._recipe, len(batch.indices)
        for rows, indices in _micro_batches(batch, recipe.parallel.micro_batch_size or count):
            rows = to_device(trimmed(rows), recipe.device)
            with autocast(recipe):
                out = trunk(
                    rows.input_ids_BT,
                    positions=rows.positions_BT,
                    document_ids=rows.document_ids_BT,
                    num_mtp=0,
                    recompute=recipe.parallel.recompute,
                )
            terms = self._terms(answer_logprobs(self._model, out, rows, self._settings.normalize_length), indices)
            yield Part(terms.loss / count, _values(terms, count), without_padding(out.routing, rows.document_ids_BT))

    def metrics(self, batch: PairBatch, sums: dict[str, float]) -> dict[str, float]:
        return sums

    def tensors(self, batch: PairBatch) -> dict[str, Tensor]:
        rows = batch.rows
        return {"input_ids": rows.input_ids_BT, "labels": rows.labels_BT, "document_ids": rows.document_ids_BT}

    @torch.no_grad()
    def evaluate(self) -> Evaluation | None:
        if not self._held:
            return None
        recipe, first = self._recipe, len(self._reference) - len(self._held)
        sums: dict[str, float] = {}
        step = recipe.parallel.micro_batch_size or recipe.batch_size
        for start in range(0, len(self._held), step):
            indices = range(start, min(start + step, len(self._held)))
            logp_B2 = _logprobs(recipe, self._model, pair_rows(self._held, indices, recipe.seq_len, self._pad_id).rows)
            terms = self._terms(logp_B2, [first + i for i in indices])
            for name, value in _values(terms, len(self._held)).items():
                sums[f"eval_{name}"] = sums.get(f"eval_{name}", 0.0) + float(value)
        return Evaluation(sums)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)

    def _terms(self, logp_B2: Tensor, indices: Sequence[int]) -> PreferenceTerms:
        ref_B2 = self._reference[list(indices)].to(logp_B2.device, logp_B2.dtype)
        return preference_terms(logp_B2, ref_B2, self._settings.beta, self._settings.label_smoothing)


def _values(terms: PreferenceTerms, count: int) -> dict[str, Tensor]:
    sums = {
        "loss": terms.loss,
        "reward_margin": terms.margin,
        "accuracy": terms.correct,
        "chosen_reward": terms.chosen_reward,
        "rejected_reward": terms.rejected_reward,
    }
    return {name: value.detach() / count for name, value in sums.items()}


def _micro_batches(batch: PairBatch, rows: int) -> Iterator[tuple[Batch, list[int]]]:
    whole = batch.rows
    parts = (whole.input_ids_BT, whole.labels_BT, whole.positions_BT, whole.document_ids_BT)
    for start in range(0, len(batch.indices), rows):
        stretch = slice(start, start + rows)
        yield Batch(*(part[stretch] for part in parts)), batch.indices[stretch]


@torch.no_grad()
def _logprobs(recipe: Recipe, model: Decoder, rows: Batch) -> Tensor:
    rows = to_device(trimmed(rows), recipe.device)
    with autocast(recipe):
        out = model.trunk(rows.input_ids_BT, positions=rows.positions_BT, document_ids=rows.document_ids_BT, num_mtp=0)
    settings = recipe.dpo or DpoSettings()
    return answer_logprobs(model, out, rows, settings.normalize_length)


def _reference(
    recipe: Recipe,
    pairs: Sequence[Pair],
    fingerprint: list[str],
    pad_id: int,
    run_dir: Path,
    on_event: Callable[[Event], None],
) -> Logprobs:
    """From the run's folder, or of the checkpoint that the run begins from; then it is written there."""
    path = run_dir / REFERENCE
    key = {"data": fingerprint, "pairs": len(pairs), "seq_len": recipe.seq_len}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            return found["logprobs"]
    on_event(Notice(f"scoring {len(pairs)} pairs with the checkpoint to begin from"))
    assert recipe.init_from is not None
    model = load_model(recipe.init_from, dtype=torch.float32, device=recipe.device)
    step = recipe.parallel.micro_batch_size or recipe.batch_size
    logprobs: Logprobs = []
    for start in range(0, len(pairs), step):
        indices = range(start, min(start + step, len(pairs)))
        logprobs += _logprobs(recipe, model, pair_rows(pairs, indices, recipe.seq_len, pad_id).rows).tolist()
    with writing(path):
        write_text(path, json.dumps({"key": key, "logprobs": logprobs}) + "\n")
    return logprobs
