"""A small model and batch on which every way to share out training must come to what one process comes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fireflyer.config import ModelConfig
from fireflyer.data.packing import NO_LABEL
from fireflyer.model.decoder import Decoder, TrunkOutput, init_weights_
from fireflyer.model.experts import Routing
from fireflyer.model.routing import expert_counts
from fireflyer.parallel.context import SequencePart
from fireflyer.train.losses import LossTerms, training_losses
from tests.tiny_run import MODEL

MTP_WEIGHT, ALPHA = 0.3, 0.05
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


@dataclass(frozen=True)
class Case:
    """rows sequences of tokens; documents: whether they're masked from each other."""

    dtype: torch.dtype
    documents: bool = True
    rows: int = 4
    tokens: int = 16
    layers: int = 4
    mtp_depth: int = 2
    tied: bool = False
    recompute: bool = False
    micro_batch: int = 1

    def model(self) -> Decoder:
        shape = MODEL | {"num_hidden_layers": self.layers, "num_nextn_predict_layers": self.mtp_depth}
        config = ModelConfig.from_dict(
            shape
            | {
                "model_type": "deepseek_v3",
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "norm_topk_prob": True,
            }
            | {"vocab_size": 50, "initializer_range": 0.2, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
            | {"tie_word_embeddings": self.tied, "num_key_value_heads": 2, "max_position_embeddings": 64}
        )
        model = Decoder(config)
        generator = torch.Generator().manual_seed(5)
        init_weights_(model, generator)
        for _, bias in model.gate_biases():
            bias.copy_(0.1 * torch.rand(bias.shape, generator=generator))
        return model.to(self.dtype)

    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(6)
        ids = torch.randint(0, 50, (self.rows, self.tokens + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.2] = NO_LABEL
        labels[0, :7] = NO_LABEL  # rows and parts with unequal numbers of labels
        documents = torch.stack([torch.arange(self.tokens) // (3 + row) for row in range(self.rows)])
        starts = torch.stack([torch.arange(self.tokens) // (3 + row) * (3 + row) for row in range(self.rows)])
        places = torch.arange(self.tokens).expand(self.rows, self.tokens)
        return Batch(
            ids[:, :-1].contiguous(),
            labels,
            places - starts if self.documents else places,
            documents if self.documents else None,
        )

    def loss(self, model: Decoder, out: TrunkOutput, batch: Batch, part: SequencePart | None = None) -> LossTerms:
        return self.loss_of(model.head_weight, model.config, out, batch.labels, batch.documents, part)

    def loss_of(
        self,
        head_weight: Tensor,
        config: ModelConfig,
        out: TrunkOutput,
        labels: Tensor,
        documents: Tensor | None,
        part: SequencePart | None,
    ) -> LossTerms:
        """out: of the batch, or of the rows that the labels are of."""
        return training_losses(
            out,
            head_weight,
            labels,
            documents,
            num_experts_per_tok=config.num_experts_per_tok,
            valid_in_batch=int((self.batch().labels != NO_LABEL).sum()),
            rows_in_batch=self.rows,
            part=part,
        )


@dataclass(frozen=True)
class Batch:
    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor | None


@dataclass(frozen=True)
class Result:
    """terms: main, mtp and balance loss; gradients by parameter; counts by MoE layer."""

    terms: list[float]
    gradients: dict[str, Tensor]
    counts: dict[int, Tensor]


def one_process(case: Case) -> Result:
    model, batch = case.model(), case.batch()
    out = model.trunk(batch.ids, positions=batch.positions, document_ids=batch.documents, recompute=case.recompute)
    terms = case.loss(model, out, batch)
    terms.total(MTP_WEIGHT, ALPHA).backward()
    return Result(
        [term.item() for term in (terms.main, terms.mtp, terms.balance)], gradients(model), counts(model, out.routing)
    )


def gradients(model: Decoder) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def counts(model: Decoder, routings: Iterable[Routing]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for routing in routings:
        chosen = expert_counts(routing.indices_NK, model.config.n_routed_experts)
        found[routing.layer_index] = found.get(routing.layer_index, 0) + chosen
    return found


def assert_same(found: Result, expected: Result, dtype: torch.dtype) -> None:
    """Losses and gradients to 1e-5 in fp32, 1e-9 in fp64, of the largest gradient; counts exactly."""
    for mine, theirs in zip(found.terms, expected.terms, strict=True):
        assert abs(mine - theirs) <= TOLERANCE[dtype] * max(1.0, abs(theirs)), (found.terms, expected.terms)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        far = (found.gradients[name] - gradient).abs().max() / max(1.0, float(gradient.abs().max()))
        assert far <= TOLERANCE[dtype], f"{name}: {far}"
    assert {layer: c.tolist() for layer, c in found.counts.items()} == {
        layer: c.tolist() for layer, c in expected.counts.items()
    }
