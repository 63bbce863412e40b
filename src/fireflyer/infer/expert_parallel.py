"""Answers on several ranks that share the routed experts: each rank has prompts of its own, and all their tokens meet
in the experts.

In: a CHECKPOINT, where each layer's experts lie, a torch.distributed group. Out: an `LLM` whose ranks step together,
those without work too, since every journey of tokens needs all of them. A rank reads the experts of its own slots from
the files and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fireflyer.checkpoint.hf import fill_model, load_tokenizer
from fireflyer.checkpoint.names import Place, published_places
from fireflyer.checkpoint.published import Checkpoint, open_checkpoint
from fireflyer.errors import UserError
from fireflyer.infer.llm import LLM, Prompt
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.outputs import RequestOutput
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts, MoE
from fireflyer.parallel.placed_experts import PlacedExperts
from fireflyer.parallel.placement import Placement, in_order


class ExpertParallelLLM:
    """One rank of the group; every rank makes it, and calls each of its methods, together with the others.

    placements: by MoE layer; default every layer's experts in their order, none of them twice.
    options: as `LLM` takes them; drafting and the deterministic mode are not for several ranks.
    """

    def __init__(
        self,
        path: str | Path,
        group: ProcessGroup,
        placements: Mapping[int, Placement] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        options: EngineOptions | None = None,
    ) -> None:
        options = options or EngineOptions(num_speculative_tokens=0)
        if options.deterministic or options.num_speculative_tokens != 0:
            raise UserError("deterministic and drafts are for one process; give num_speculative_tokens=0 alone")
        self.group, self._dtype = group, dtype
        checkpoint = open_checkpoint(path)
        # MTP modules only draft.
        self._checkpoint = replace(checkpoint, config=checkpoint.config.replace(num_nextn_predict_layers=0))
        if not checkpoint.config.n_routed_experts:
            raise UserError(f"{path}: its model has no routed experts to share; give LLM to each rank")
        self._model = _without_experts(self._checkpoint, dtype)
        self.place(placements)
        self.llm = LLM.from_model(self._model, load_tokenizer(path), options=options)

    def place(self, placements: Mapping[int, Placement] | None) -> None:
        """Have every layer's experts lie so, read anew from the files; counts begin again at 0."""
        config, group, layers = self._checkpoint.config, self.group, _moe_layers(self._model)
        if placements is None:
            placements = dict.fromkeys(layers, in_order(config.n_routed_experts, group.size()))
        for layer in layers:
            placement = placements.get(layer)
            if placement is None or (placement.num_experts, placement.ranks) != (config.n_routed_experts, group.size()):
                raise UserError(
                    f"layer {layer}: no placement of {config.n_routed_experts} experts on {group.size()} ranks;"
                    " give one for each MoE layer"
                )
        for layer, moe in layers.items():
            placed = PlacedExperts(config, placements[layer], group, self._dtype)
            own = _OwnExperts(self._checkpoint, moe.layer_index, set(placed.own_experts))
            placed.fill(own.read)
            moe.experts = placed

    def loads(self) -> dict[int, list[int]]:
        """By MoE layer, how many tokens of all ranks chose each expert since it was placed."""
        found = {}
        for layer, moe in _moe_layers(self._model).items():
            counts_E = _placed(moe).chosen_E.clone()
            torch.distributed.all_reduce(counts_E, group=self.group)
            found[layer] = counts_E.tolist()
        return found

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """Answers to this rank's own prompts, perhaps none, in their order; returns when all ranks have theirs.

        Raises UserError on every rank where one of them was given a prompt that can't be answered.
        """
        llm, error = self.llm, None
        requests = []
        try:
            requests = [llm.make_request(prompt, sampling_params or SamplingParams()) for prompt in prompts]
            for request in requests:
                llm.engine.add(request)
        except UserError as refused:
            error = refused
        if self._any(error is not None):
            for request in requests:
                llm.engine.abort(request.request_id)
            raise error or UserError("another rank was given a prompt that can't be answered")
        while self._any(llm.engine.unfinished):
            if llm.engine.unfinished:
                llm.engine.step()
            else:
                self._idle_step()
        return [request.output() for request in requests]

    def _any(self, flag: bool) -> bool:
        flags = torch.tensor([int(flag)])
        torch.distributed.all_reduce(flags, group=self.group)
        return bool(flags)

    @torch.inference_mode()
    def _idle_step(self) -> None:
        """Take part in the others' step with no tokens: their experts may lie here."""
        config = self._checkpoint.config
        x_ND = torch.empty(0, config.hidden_size, dtype=self._dtype)
        indices_NK = torch.empty(0, config.num_experts_per_tok, dtype=torch.int64)
        for moe in _moe_layers(self._model).values():
            moe.experts(x_ND, indices_NK, indices_NK.to(torch.float32))


class _OwnExperts:
    """Some experts of one layer in a checkpoint's files."""

    def __init__(self, checkpoint: Checkpoint, layer_index: int, experts: set[int]) -> None:
        self._checkpoint = checkpoint
        name = f"model.layers.{layer_index}.mlp.experts."
        self._places: dict[int, list[Place]] = {expert: [] for expert in experts}
        for place in published_places(checkpoint.config):
            if place.expert in self._places and place.name.startswith(name):
                self._places[place.expert].append(place)

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """Gate and up (2I, D), and down (D, I)."""
        gate, up, down = (self._checkpoint.tensors[place.name][:] for place in self._places[expert])
        return torch.cat((gate, up)), down


def _without_experts(checkpoint: Checkpoint, dtype: torch.dtype) -> Decoder:
    """The model but for its routed experts."""
    config = checkpoint.config
    with torch.device("meta"):
        model = Decoder(config)
    for moe in _moe_layers(model).values():
        moe.experts = cast(Experts, nn.Module())
    model.to(dtype).to_empty(device="cpu")
    fill_model(model, checkpoint)
    return model


def _moe_layers(model: Decoder) -> dict[int, MoE]:
    """By layer, in order."""
    found = {}
    for layer in model.model.layers:
        if isinstance(layer.mlp, MoE):
            found[layer.mlp.layer_index] = layer.mlp
    return found


def _placed(moe: MoE) -> PlacedExperts:
    assert isinstance(moe.experts, PlacedExperts)
    return moe.experts
