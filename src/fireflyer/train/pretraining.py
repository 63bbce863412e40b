"""Pretraining as an objective: packed rows of text, next-token and MTP cross entropy, the sequence-wise balance loss.

Held-out rows are scored in nats and in bits a byte; how often the MTP module says what the model says next is measured
on the first of them, and the model goes on with the beginnings of a few, for people to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fireflyer.data.held_out import HeldOutRows
from fireflyer.data.packing import NO_LABEL, Batch
from fireflyer.evaluate.likelihood import Likelihood, held_out_likelihood
from fireflyer.evaluate.speculation import draft_agreement
from fireflyer.infer.llm import LLM
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import Decoder, TrunkOutput
from fireflyer.model.experts import Routing
from fireflyer.parallel.context import SequencePart, Sequences
from fireflyer.parallel.ranks import ALONE, Alone, Ranks
from fireflyer.parallel.stage_loss import StageLoss, StageResult
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.losses import LossTerms, balance_loss, count_valid, head_cross_entropy, training_losses
from fireflyer.train.objective import Evaluation, Part, Trunk
from fireflyer.train.precision import autocast
from fireflyer.train.schedule import mtp_weight
from fireflyer.train.settings import Recipe

if TYPE_CHECKING:
    from fireflyer.parallel.pipeline import Pipeline

_BEGINNING_TOKENS, _SAMPLE_TOKENS = 24, 64


class BatchSource(Protocol):
    """Rows of text, as `data.loader.Loader` gives them; of chats, as `data.chats.ChatLoader`."""

    @property
    def epoch(self) -> int: ...

    def next_batch(self, batch_size: int) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Pretraining:
    """An `Objective` over a source's batches."""

    watches_loss = True

    def __init__(
        self, recipe: Recipe, model: Decoder, tokenizer: Tokenizer, loader: BatchSource, held_out: HeldOutRows | None
    ) -> None:
        self._recipe, self._model, self._tokenizer = recipe, model, tokenizer
        self.loader = loader
        self.held_out = held_out
        self.ranks: Ranks = ALONE
        """Who shares the work; every rank reads whole batches, and computes its rows of them."""

    @property
    def epoch(self) -> int:
        return self.loader.epoch

    def next_batch(self, batch_size: int) -> Batch:
        return self.loader.next_batch(batch_size)

    def size(self, batch: Batch) -> tuple[int, int]:
        return batch.input_ids_BT.shape[0], batch.input_ids_BT.numel()

    def parts(self, batch: Batch, trunk: Trunk, tokens: int) -> Iterator[Part]:
        recipe, model, ranks = self._recipe, self._model, self.ranks
        take_loss = self._loss_of(batch, tokens)
        share, size = ranks.share(batch.input_ids_BT.shape[0]), recipe.parallel.micro_batch_size
        if ranks.pipeline is not None:
            for result in ranks.pipeline.step(_rows(batch, share, recipe.device), size, take_loss):
                yield Part(result.loss, result.values, result.routing)
            return
        part = ranks.part_of(batch.input_ids_BT.shape[1], recipe.device)
        for micro, last in _micro_batches(batch, share, size, recipe.device):
            documents = micro.document_ids_BT if recipe.data.mask_documents else None
            with autocast(recipe):
                if part is None:
                    out = trunk(
                        micro.input_ids_BT,
                        positions=micro.positions_BT,
                        document_ids=documents,
                        recompute=recipe.parallel.recompute,
                    )
                else:
                    sequences = Sequences(micro.input_ids_BT, micro.positions_BT, documents, part)
                    out = model.trunk_of(sequences, recompute=recipe.parallel.recompute)
                result = take_loss(micro, out, model.head_weight, part)
            yield Part(result.loss, result.values, result.routing, last)

    def _loss_of(self, batch: Batch, tokens: int) -> StageLoss:
        """What is minimised, of any rows, tokens and layers of a batch."""
        recipe = self._recipe
        weight, alpha = mtp_weight(recipe, tokens), recipe.balance.sequence_alpha
        rows, valid = batch.input_ids_BT.shape[0], count_valid(batch.labels_BT)
        per_tok = recipe.model.num_experts_per_tok

        def loss(micro: Batch, out: TrunkOutput, head_weight: Tensor | None, part: SequencePart | None) -> StageResult:
            documents = micro.document_ids_BT if recipe.data.mask_documents else None
            if head_weight is None:
                none = torch.zeros(())
                balance = balance_loss(out.routing, num_experts_per_tok=per_tok, rows_in_batch=rows, part=part)
                terms = LossTerms(none, none, balance)
            else:
                terms = training_losses(
                    out,
                    head_weight,
                    micro.labels_BT,
                    documents,
                    num_experts_per_tok=per_tok,
                    valid_in_batch=valid,
                    rows_in_batch=rows,
                    part=part,
                )
            values = {"loss": terms.main, "mtp_loss": terms.mtp, "balance_loss": terms.balance}
            own_documents = documents if documents is None or part is None else part.own(documents)
            return StageResult(terms.total(weight, alpha), values, without_padding(out.routing, own_documents))

        return loss

    def metrics(self, batch: Batch, sums: dict[str, float]) -> dict[str, float]:
        return sums

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "input_ids": batch.input_ids_BT,
            "labels": batch.labels_BT,
            "positions": batch.positions_BT,
            "document_ids": batch.document_ids_BT,
        }

    def evaluate(self) -> Evaluation | None:
        if self.held_out is None:
            return None
        if self.ranks.pipeline is not None:
            scored, agreement = self._piped_likelihood(self.ranks.pipeline, self.held_out), None
        else:
            mask_documents = self._recipe.data.mask_documents
            with autocast(self._recipe):
                scored = held_out_likelihood(self._model, self.held_out, mask_documents=mask_documents)
                agreement = draft_agreement(self._model, self.held_out.batches[0], mask_documents=mask_documents)
        values = {"eval_loss": scored.loss, "bits_per_byte": scored.bits_per_byte}
        if agreement is not None:
            values["mtp_acceptance"] = agreement
        return Evaluation(values, self._samples())

    def _piped_likelihood(self, pipeline: Pipeline, rows: HeldOutRows) -> Likelihood:
        """`held_out_likelihood` where no rank has all layers; every pipeline scores all rows."""

        def loss(micro: Batch, out: TrunkOutput, head_weight: Tensor | None, part: SequencePart | None) -> StageResult:
            total = torch.zeros(())
            if head_weight is not None:
                total = head_cross_entropy(
                    out.hidden_BTD, head_weight, micro.labels_BT if part is None else part.own(micro.labels_BT)
                )
            return StageResult(total, {"loss": total}, [])

        total = 0.0
        for batch in rows.batches:
            whole = _rows(batch, slice(None), self._recipe.device)
            total += sum(float(result.values["loss"]) for result in pipeline.forward_only(whole, loss))
        total = self.ranks.summed({"loss": total})["loss"] / self.ranks.layout.dp
        return Likelihood(total / max(rows.num_labels, 1), rows.bits_per_byte(total))

    def _samples(self) -> list[dict[str, Any]]:
        """What the model makes of the beginnings of the first held-out rows: of a problem its answer."""
        alone = isinstance(self.ranks, Alone)
        if self.held_out is None or not self._recipe.eval_samples or self._recipe.lora is not None or not alone:
            return []  # the engine reads weights as they are: whole, and without adapters
        batch = self.held_out.batches[0]
        rows = range(min(self._recipe.eval_samples, batch.input_ids_BT.shape[0]))
        prompts = [beginning(batch.input_ids_BT[row], batch.labels_BT[row]) for row in rows]
        longest = max(map(len, prompts)) + _SAMPLE_TOKENS
        limit = min(longest, self._model.config.max_position_embeddings)
        llm = LLM.from_model(
            self._model, self._tokenizer, options=EngineOptions(max_length=limit, max_num_seqs=len(prompts))
        )
        outputs = llm.generate(prompts, SamplingParams(max_tokens=_SAMPLE_TOKENS, temperature=0))
        texts = [self._tokenizer.decode(prompt, skip_special=True) for prompt in prompts]
        return [{"prompt": text, "text": output.outputs[0].text} for text, output in zip(texts, outputs, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def without_padding(routing: list[Routing], document_ids_BT: Tensor | None) -> list[Routing]:
    """The routing of what is text: the experts that padding chose are no load to be balanced."""
    if document_ids_BT is None or not bool((document_ids_BT < 0).any()):
        return routing
    text = [(document_ids_BT[:, : layer.shape_BT[1]] >= 0).flatten() for layer in routing]
    return [
        replace(layer, indices_NK=layer.indices_NK[rows], scores_NE=layer.scores_NE[rows])
        for layer, rows in zip(routing, text, strict=True)
    ]


def beginning(input_ids_T: Tensor, labels_T: Tensor) -> list[int]:
    """What a row begins with: all before the first token that is trained on, or else its first few tokens."""
    valid = (labels_T != NO_LABEL).nonzero()
    first = int(valid[0]) + 1 if len(valid) else 1
    return input_ids_T[: first if first > 1 else min(_BEGINNING_TOKENS, len(input_ids_T) // 2)].tolist()


def _micro_batches(batch: Batch, share: slice, rows: int, device: str) -> Iterator[tuple[Batch, bool]]:
    """A share of the batch's rows, so many at a time (0: all), and whether they are the last."""
    for start in range(share.start, share.stop, rows or share.stop):
        stop = min(start + (rows or share.stop), share.stop)
        yield _rows(batch, slice(start, stop), device), stop == share.stop


def _rows(batch: Batch, rows: slice, device: str) -> Batch:
    parts = (batch.input_ids_BT, batch.labels_BT, batch.positions_BT, batch.document_ids_BT)
    return Batch(*(part[rows].to(device) for part in parts))
