"""Pipeline parallelism: each rank holds some layers, and micro-batches pass through all ranks and back.

In: a whole Decoder, the same on every rank, and a plan of stages. Out: the Decoder without the layers of others, and a
`Pipeline` that takes a batch forward and backward by one of torch's schedules. Only hidden states travel. Each stage
takes its layers' balance loss itself, as a gradient that its output brings along; what it routed stays where it was.

MTP (and a tied head) uses the embedding, which lies in the first stage: the last one has a copy, whose gradient is
added to the embedding's after the backward, and which follows it after the optimizer's step. It is no parameter of the
model: optimizer, gradient norm and checkpoints know the embedding alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor

from fireflyer.data.packing import Batch
from fireflyer.model.decoder import Decoder, TrunkOutput, run_layers, run_tail
from fireflyer.model.experts import Routing
from fireflyer.parallel.context import SequencePart, Sequences, sequence_part
from fireflyer.parallel.stage_loss import StageLoss, StageResult
from fireflyer.parallel.stages import PipelineSettings, StagePlan, plan_stages

T = TypeVar("T")


class Absent(nn.Module):
    """In the place of a module that another rank has."""


class TailModules(nn.Module):
    """What follows the last layer."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.norm, self.mtp, self.lm_head = model.model.norm, model.model.mtp, model.lm_head
        self.embed_tokens: nn.Module = Absent()
        if model.config.tie_word_embeddings or len(self.mtp):
            copy = model.model.embed_tokens.weight.detach().clone()
            self.embed_tokens = nn.Embedding.from_pretrained(copy, freeze=False)

    @property
    def head_weight(self) -> Tensor:
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        assert isinstance(head, nn.Embedding | nn.Linear)
        return head.weight


class Stage(nn.Module):
    """One stage's modules, as torch's schedules call them."""

    def __init__(self, model: Decoder, layers: range, first: bool, last: bool, settings: PipelineSettings) -> None:
        super().__init__()
        self.config = model.config
        self.layers = nn.ModuleList(model.model.layers[index] for index in layers)
        self.embed_tokens = model.model.embed_tokens if first else None
        self.tail = TailModules(model) if last else None
        self.settings = settings
        self.step: tuple[StageLoss, SequencePart] | None = None
        """Of the batch that is on its way."""
        self.seen: list[StageResult] = []

    @property
    def uses_twice(self) -> bool:
        """Whether one use of a parameter lies upstream of another: torch can't take their gradients apart from the
        inputs' (its second pass would go through what the first has freed)."""
        if self.tail is None:
            return False
        return len(self.tail.mtp) + (self.tail.lm_head is None) > 1

    def forward(
        self, x: Tensor, input_ids_BS: Tensor, labels_BS: Tensor, positions_BS: Tensor, document_ids_BS: Tensor
    ) -> Tensor:
        """x: token ids in the first stage, otherwise the hidden states (B, T, D) of the one before. Returns hidden
        states; the last stage its loss."""
        assert self.step is not None
        settings, (take_loss, part) = self.settings, self.step
        documents = document_ids_BS if settings.mask_documents else None
        sequences = Sequences(input_ids_BS, positions_BS, documents, part)
        batch = Batch(input_ids_BS, labels_BS, positions_BS, document_ids_BS)
        routing: list[Routing] = []
        with settings.around():
            hidden_BTD = x if self.embed_tokens is None else self.embed_tokens(sequences.ids())
            inputs = sequences.attention(self.config)
            hidden_BTD = run_layers(self.layers, hidden_BTD, inputs, settings.recompute, routing)
            if self.tail is None:
                result = take_loss(batch, TrunkOutput(hidden_BTD, [], routing), None, part)
            else:
                out = run_tail(self.config, self.tail, hidden_BTD, sequences, settings.recompute, routing)
                result = take_loss(batch, out, self.tail.head_weight, part)
        values = {name: value.detach() for name, value in result.values.items()}
        self.seen.append(StageResult(result.loss.detach(), values, result.routing))
        if self.tail is not None:
            return result.loss
        return _WithLoss.apply(hidden_BTD, result.loss) if result.loss.requires_grad else hidden_BTD


def _at_once() -> Callable[[], None]:
    """For torch's split of a backward into inputs' and weights' part: all is done in the first."""
    return lambda: None


class _WithLoss(torch.autograd.Function):
    """The hidden states; whoever takes a gradient of them takes the loss's too."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden_BTD.clone()  # torch's schedules detach outputs in place, which no view can be

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


class Pipeline:
    """This rank's stages of a model.

    Args:
        model: whole; what other ranks hold is taken out of it.
        group: the ranks of the pipeline, in order.
        context: the ranks that hold other parts of the same sequences, where there are any.
    """

    def __init__(
        self,
        model: Decoder,
        settings: PipelineSettings,
        group: ProcessGroup,
        context: ProcessGroup | None = None,
    ) -> None:
        self.plan = plan = plan_stages(model.config, settings.schedule, group.size(), settings.stages)
        self.group, self.context = group, context
        self.hidden_size, self.dtype, self.device = model.config.hidden_size, model.dtype, model.device
        last = len(plan.layers) - 1
        self.numbers = plan.stages_of(group.rank())
        self.stages = [
            Stage(model, plan.layers[number], number == 0, number == last, settings) for number in self.numbers
        ]
        shared = model.config.tie_word_embeddings or len(model.model.mtp) > 0
        self._shared = SharedEmbedding(self.stages, group, plan.ranks[0], plan.ranks[-1]) if shared else None
        _leave_out_others(model, plan, self.numbers)
        self._schedules: dict[tuple[int, int, int], Any] = {}

    def step(self, batch: Batch, micro_batch_size: int, loss: StageLoss) -> list[StageResult]:
        """Forward and backward of all rows of a batch, the same on all ranks of the pipeline; gradients add up.

        Returns what this rank's stages made of the micro-batches.
        """
        rows, num_tokens = batch.input_ids_BT.shape
        part = sequence_part(num_tokens, self.context, self.device)
        self._begin(loss, part)
        schedule = self._schedule(rows // (micro_batch_size or rows), rows, part)
        schedule.step(
            *((batch.input_ids_BT,) if self.numbers[0] == 0 else ()),
            target=batch.labels_BT,
            return_outputs=False,
            input_ids_BS=batch.input_ids_BT,
            labels_BS=batch.labels_BT,
            positions_BS=batch.positions_BT,
            document_ids_BS=batch.document_ids_BT,
        )
        if self._shared is not None:
            self._shared.add_gradient()
        return self._end()

    @torch.no_grad()
    def forward_only(self, batch: Batch, loss: StageLoss) -> list[StageResult]:
        """`step` without a backward, all rows at once, one stage after the other."""
        part = sequence_part(batch.input_ids_BT.shape[1], self.context, self.device)
        self._begin(loss, part)
        here, ranks, last = self.group.rank(), self.plan.ranks, len(self.plan.ranks) - 1
        x = batch.input_ids_BT
        for number, stage in zip(self.numbers, self.stages, strict=True):
            if number and ranks[number - 1] != here:
                x = torch.empty(len(x), len(part.places_T), self.hidden_size, dtype=self.dtype, device=self.device)
                dist.recv(x, group=self.group, group_src=ranks[number - 1])
            x = stage(x, batch.input_ids_BT, batch.labels_BT, batch.positions_BT, batch.document_ids_BT)
            if number < last and ranks[number + 1] != here:
                dist.send(x.contiguous(), group=self.group, group_dst=ranks[number + 1])
        return self._end()

    def _begin(self, loss: StageLoss, part: SequencePart) -> None:
        for stage in self.stages:
            stage.step = loss, part

    def _end(self) -> list[StageResult]:
        seen = [result for stage in self.stages for result in stage.seen]
        for stage in self.stages:
            stage.step, stage.seen = None, []
        return seen

    def after_update(self) -> None:
        """To be called when the optimizer has changed the weights."""
        if self._shared is not None:
            self._shared.follow()

    def _schedule(self, count: int, rows: int, part: SequencePart) -> Any:
        key = (count, rows, part.num_tokens)
        if key not in self._schedules:
            self._schedules[key] = self._new_schedule(count, rows // count, part)
        return self._schedules[key]

    def _new_schedule(self, count: int, rows: int, part: SequencePart) -> Any:
        hidden = torch.empty(
            rows, len(part.places_T), self.hidden_size, dtype=self.dtype, device="meta", requires_grad=True
        )
        ids = torch.empty(rows, part.num_tokens, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=self.dtype, device="meta", requires_grad=True)
        last = len(self.plan.layers) - 1
        stages = [
            PipelineStage(
                stage,
                number,
                len(self.plan.layers),
                self.device,
                input_args=ids if number == 0 else hidden,
                output_args=loss if number == last else hidden,
                group=self.group,
                dw_builder=_at_once if stage.uses_twice else None,
            )
            for number, stage in zip(self.numbers, self.stages, strict=True)
        ]
        # The losses are shares of the whole batch's: their gradients add up, and nothing is divided afterwards.
        options: dict[str, Any] = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        if self.plan.schedule == "1f1b":
            return Schedule1F1B(stages[0], count, **options)
        kinds = {
            "interleaved": ScheduleInterleaved1F1B,
            "zero-bubble": ScheduleInterleavedZeroBubble,
            "dualpipev": ScheduleDualPipeV,
        }
        return kinds[self.plan.schedule](stages, count, **options)


class SharedEmbedding:
    """The embedding in the first stage and its copy in the last, where one of them or both are on this rank."""

    def __init__(self, stages: list[Stage], group: ProcessGroup, first_rank: int, last_rank: int) -> None:
        self._group, self._first, self._last = group, first_rank, last_rank
        self._embedding = self._copy = None
        for stage in stages:
            if stage.embed_tokens is not None:
                self._embedding = stage.embed_tokens
            if stage.tail is not None and isinstance(stage.tail.embed_tokens, nn.Embedding):
                self._copy = stage.tail.embed_tokens

    @torch.no_grad()
    def add_gradient(self) -> None:
        """To the embedding's gradient its copy's."""
        mine, theirs = _gradient(self._embedding), _gradient(self._copy)
        came = self._carried(theirs, mine, self._last, self._first)
        if mine is not None and came is not None:
            mine.add_(came)
        if self._copy is not None:
            self._copy.weight.grad = None

    @torch.no_grad()
    def follow(self) -> None:
        """The copy becomes what the embedding is."""
        source, copy = (None if module is None else _local(module.weight) for module in (self._embedding, self._copy))
        came = self._carried(source, copy, self._first, self._last)
        if copy is not None and came is not None:
            copy.copy_(came)

    def _carried(self, tensor: Tensor | None, like: Tensor | None, source: int, target: int) -> Tensor | None:
        """`tensor` of rank `source` on rank `target`, where it is `like` another; None on the others."""
        here = self._group.rank()
        if source == target:
            return tensor
        if here == source and tensor is not None:
            dist.send(tensor.contiguous(), group=self._group, group_dst=target)
        if here == target and like is not None:
            received = torch.empty_like(like)
            dist.recv(received, group=self._group, group_src=source)
            return received
        return None


def _gradient(embedding: nn.Embedding | None) -> Tensor | None:
    if embedding is None or embedding.weight.grad is None:
        return None
    return _local(embedding.weight.grad)


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that data ranks share out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _leave_out_others(model: Decoder, plan: StagePlan, numbers: list[int]) -> None:
    """Only these stages' modules stay in the model, under the names that they have in the whole one."""
    here = {index for number in numbers for index in plan.layers[number]}
    for index in range(len(model.model.layers)):
        if index not in here:
            model.model.layers[index] = Absent()
    if 0 not in numbers:
        model.model.add_module("embed_tokens", Absent())
    if len(plan.layers) - 1 not in numbers:
        model.model.add_module("norm", Absent())
        model.model.mtp = nn.ModuleList()
        if model.lm_head is not None:
            model.lm_head = Absent()


def gathered(tensors: dict[T, Tensor], group: ProcessGroup, device: torch.device) -> dict[T, Tensor]:
    """What all ranks of a group have, by names that no two share, on its first; on the others their own."""
    shapes: list[dict[T, tuple[torch.Size, torch.dtype]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(shapes, {name: (t.shape, t.dtype) for name, t in tensors.items()}, group=group)
    if group.rank() != 0:
        for tensor in tensors.values():
            dist.send(tensor.to(device).contiguous(), group=group, group_dst=0)
        return tensors
    found = dict(tensors)
    for rank, theirs in list(enumerate(shapes))[1:]:
        for name, (shape, dtype) in theirs.items():
            received = torch.empty(shape, dtype=dtype, device=device)
            dist.recv(received, group=group, group_src=rank)
            found[name] = received.cpu()
    return found
