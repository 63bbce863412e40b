"""LoRA (arXiv 2106.09685): frozen weights with trained low-rank terms beside them, W + alpha / rank · B A.

In: a Decoder and [lora]. Out: the same Decoder, in place, whose chosen projections have adapters; routed experts have
one each, stacked as their weights are. B begins at 0, so that the first step sees the checkpoint itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.checkpoint.adapter import Adapter
from fireflyer.checkpoint.names import Place, published_places
from fireflyer.config import ModelConfig
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts, grouped_linear
from fireflyer.model.row_tiles import RowTiles
from fireflyer.train.post_training_settings import LoraSettings


class LoraLinear(nn.Module):
    """A linear layer; `weight` is the frozen one, under the name that it had."""

    def __init__(self, weight: Tensor, settings: LoraSettings, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = settings.alpha / settings.rank
        self.lora_A, self.lora_B = _halves(weight, settings.rank, generator)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


class LoraExperts(Experts):
    """Routed experts; whatever the number of tokens, they take the way that training takes."""

    def __init__(self, experts: Experts, own: set[str], settings: LoraSettings, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts.num_experts
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.scale = settings.alpha / settings.rank
        for name, weight in (("gate_up_proj", experts.gate_up_proj), ("down_proj", experts.down_proj)):
            halves = _halves(weight, settings.rank, generator) if name in own else (None, None)
            for half, parameter in zip(("lora_A", "lora_B"), halves, strict=True):
                self.register_parameter(f"{name}_{half}", parameter)

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor, tiles: RowTiles | None = None) -> Tensor:
        assert tiles is None, "adapters are merged before a model serves"
        return self.sorted_by_expert(x_ND, indices_NK, weights_NK)

    def up(self, x_MD: Tensor, ends_E: Tensor) -> Tensor:
        return super().up(x_MD, ends_E) + self._added("gate_up_proj", x_MD, ends_E)

    def down(self, x_MI: Tensor, ends_E: Tensor) -> Tensor:
        return super().down(x_MI, ends_E) + self._added("down_proj", x_MI, ends_E)

    def _added(self, name: str, x: Tensor, ends_E: Tensor) -> Tensor | float:
        parameters = dict(self.named_parameters(recurse=False))
        if f"{name}_lora_A" not in parameters:
            return 0.0
        low = grouped_linear(x, parameters[f"{name}_lora_A"], ends_E)
        return grouped_linear(low, parameters[f"{name}_lora_B"], ends_E) * self.scale


def attach_adapters(model: Decoder, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and put adapters beside the chosen projections. Raises UserError where it has none of them."""
    own = {"gate_up_proj" if target in ("gate_proj", "up_proj") else target for target in settings.targets}
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in own:
                module.register_module(name, LoraLinear(child.weight, settings, generator))
            elif isinstance(child, Experts) and settings.experts and own & {"gate_up_proj", "down_proj"}:
                module.register_module(name, LoraExperts(child, own, settings, generator))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"lora.targets = {settings.targets}: the model has none of them; leave it out")


def adapter_pairs(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters by published names, as views of `state`; gate and up projection share their A."""
    pairs = {}
    for place in published_places(config):
        a_name, b_name = _names(place)
        if a_name in state and place.copy_of is None:
            a, b = state[a_name], state[b_name]
            if place.expert is not None:
                a, b = a[place.expert], b[place.expert]
            pairs[place.name] = (a, b if place.rows is None else b[place.rows[0] : place.rows[1]])
    return pairs


@torch.no_grad()
def fill_adapters(model: Decoder, adapter: Adapter) -> None:
    """Put saved adapters back, to the bit. Raises UserError where they are of other targets or ranks."""
    pairs = adapter_pairs(model.config, model.state_dict())
    if pairs.keys() != adapter.pairs.keys():
        raise UserError(f"{adapter.folder}: adapts other projections than lora.targets; begin another run")
    for name, halves in pairs.items():
        for half, saved in zip(halves, adapter.pairs[name], strict=True):
            if half.shape != saved.shape:
                raise UserError(f"{adapter.folder}: {name} has another rank than lora.rank; begin another run")
            half.copy_(saved)


def _names(place: Place) -> tuple[str, str]:
    if place.expert is not None:
        return f"{place.parameter}_lora_A", f"{place.parameter}_lora_B"
    stem = place.parameter.removesuffix(".weight")
    return f"{stem}.lora_A", f"{stem}.lora_B"


def _halves(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """A (…, rank, in) uniform within 1/sqrt(in), B (…, out, rank) zero; drawn on the CPU, the same on every device."""
    *stack, rows, columns = weight.shape
    bound = 1 / math.sqrt(columns)
    a = torch.empty(*stack, rank, columns).uniform_(-bound, bound, generator=generator)
    b = torch.zeros(*stack, rows, rank)
    return nn.Parameter(a.to(weight.device)), nn.Parameter(b.to(weight.device))
