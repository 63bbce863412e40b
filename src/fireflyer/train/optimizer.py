"""One optimizer for a whole decoder: AdamW, or Muon for the hidden matrices with AdamW for the rest.

In: a Decoder with gradients and the recipe's [optimizer]. Out: updated parameters; the state as named tensors. The V3
report, 4.2: AdamW with betas .9/.95, weight decay .1, gradients clipped at norm 1. Muon as Moonlight trained with it
(arXiv 2502.16982): torch's own, its update scaled by 0.2·sqrt(max(A, B)) so that AdamW's rate and decay hold for it.

Weight decay is for matrices: embedding, head, gate, projections and experts. Norm gains (one axis) have none: the
report names no exception, but this is what the field does. The gate bias is a buffer, which balance moves, not we.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fireflyer.errors import UserError
from fireflyer.parallel.ranks import ALONE, Ranks
from fireflyer.train.narrow_adamw import NarrowAdamW
from fireflyer.train.settings import OptimizerSettings, Recipe

ADAMW_STATE = ("exp_avg", "exp_avg_sq", "step")
MUON_STATE = ("momentum",)


class DecoderOptimizer:
    """AdamW over all parameters, or Muon over `muon_parts` of the hidden matrices and AdamW over the others.

    moments: the dtype of AdamW's two; torch's own keeps them in the parameters'.
    """

    def __init__(self, model: nn.Module, settings: OptimizerSettings, moments: torch.dtype = torch.float32) -> None:
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        hidden = {name for name, p in named.items() if is_hidden_matrix(name, p)} if settings.name == "muon" else set()
        self._named = named
        self._adamw = _adamw({name: p for name, p in named.items() if name not in hidden}, settings, moments)
        self._muon = (
            _MuonMatrices({name: p for name, p in named.items() if name in hidden}, settings) if hidden else None
        )

    def step(self, lr: float) -> None:
        """Update every parameter that has a gradient, at learning rate `lr`."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        if self._muon is not None:
            self._muon.step(lr)

    def zero_grad(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state, by "<parameter name>.<moment>": the very tensors, not copies. Complete from the start."""
        found = {}
        for name, parameter in self._named.items():
            if self._muon is not None and name in self._muon.momentum:
                found[f"{name}.momentum"] = self._muon.momentum[name]
            else:
                found |= {f"{name}.{moment}": self._adamw.state[parameter][moment] for moment in ADAMW_STATE}
        return found


def build_optimizer(model: nn.Module, recipe: Recipe) -> DecoderOptimizer:
    """The optimizer of a run. The model must be on its device: the state is made beside the parameters."""
    moments = torch.bfloat16 if recipe.precision.moments == "bf16" else torch.float32
    return DecoderOptimizer(model, recipe.optimizer, moments)


def optimizer_tensors(optimizer: DecoderOptimizer) -> dict[str, Tensor]:
    """The state as named tensors: moments in the parameters' shapes, and AdamW's step counts (scalars).

    They are the live tensors: copy them before the next step if that must not change them.
    """
    return optimizer.tensors()


def load_optimizer_tensors(optimizer: DecoderOptimizer, tensors: dict[str, Tensor], ranks: Ranks = ALONE) -> None:
    """Put saved state back, exactly. A missing, extra or misshaped tensor raises UserError, and nothing is changed.

    tensors: whole ones; a rank of several takes its share of each.
    """
    own = {name: ranks.local(tensor) for name, tensor in optimizer.tensors().items()}
    tensors = {name: tensor if tensor.ndim == 0 else ranks.share_of(name, tensor) for name, tensor in tensors.items()}
    for name in sorted(own.keys() | tensors.keys()):
        if name not in tensors:
            raise UserError(f"optimizer state: {name} is missing; the checkpoint is of another model or optimizer")
        if name not in own:
            raise UserError(f"optimizer state: {name} belongs to nothing here; the checkpoint is of another run")
        if own[name].shape != tensors[name].shape:
            shapes = f"{tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            raise UserError(f"optimizer state: {name} has shape {shapes}; the checkpoint is of another model")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def clip_gradients(parameters: Iterable[Tensor], max_norm: float, ranks: Ranks = ALONE) -> float:
    """Scale all gradients down to norm `max_norm` together (0: leave them); returns the norm they had, on all ranks.

    Gradients whose norm isn't finite are left as they are: scaling would turn an inf into nan everywhere and hide where
    it came from.
    """
    gradients = [ranks.local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = ranks.total_norm(gradients)
    value = float(norm)
    if max_norm > 0 and max_norm < value < float("inf"):
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.to(gradient.device))
    return value


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may have it: matrices and stacks of them, but not embedding, head or gate (Moonlight, 2.2)."""
    outer = name.endswith(("embed_tokens.weight", "lm_head.weight", ".gate.weight"))
    return parameter.ndim >= 2 and not outer


def _adamw(
    named: dict[str, nn.Parameter], settings: OptimizerSettings, moments: torch.dtype
) -> torch.optim.AdamW | NarrowAdamW:
    matrices = [p for p in named.values() if p.ndim >= 2]
    gains = [p for p in named.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if moments == torch.float32:
        adamw = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)
    else:
        adamw = NarrowAdamW(groups, betas=settings.betas, eps=settings.eps)
    # Made here and not at the first step, so that a checkpoint of any moment holds the same names.
    for parameter in named.values():
        kept = parameter.dtype if moments == torch.float32 else moments
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=kept, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, dtype=kept, memory_format=torch.preserve_format),
        }
    return adamw


class _MuonMatrices:
    """torch's Muon over single matrices: it refuses stacks, so each part is a view into its parameter's storage.

    Each published matrix is one part: an expert's gate, up and down projection, not the stack and not gate beside up.
    """

    def __init__(self, named: dict[str, nn.Parameter], settings: OptimizerSettings) -> None:
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        self._parts: list[tuple[nn.Parameter, list[Tensor], str]] = []
        for name, parameter in named.items():
            self._parts.append((parameter, muon_parts(name, parameter.detach()), name))
        self._muon = torch.optim.Muon(
            [{"params": views} for _, views, _ in self._parts],
            weight_decay=settings.weight_decay,
            momentum=settings.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        for _, views, name in self._parts:
            for view, buffer in zip(views, muon_parts(name, self.momentum[name]), strict=True):
                self._muon.state[view] = {"momentum_buffer": buffer}

    def step(self, lr: float) -> None:
        for group in self._muon.param_groups:
            group["lr"] = lr
        for parameter, views, name in self._parts:
            assert views[0].data_ptr() == parameter.data_ptr(), f"{name} was moved after the optimizer was built"
            grads = muon_parts(name, parameter.grad) if parameter.grad is not None else [None] * len(views)
            for view, grad in zip(views, grads, strict=True):
                view.grad = grad
        self._muon.step()
        for _, views, _ in self._parts:
            for view in views:
                view.grad = None


def muon_parts(name: str, tensor: Tensor) -> list[Tensor]:
    """The published matrices within a hidden parameter, as views: experts apart, and gate apart from up."""
    matrices = list(tensor.unbind(0)) if tensor.ndim == 3 else [tensor]
    if name.endswith(("gate_up_proj", "gate_up_proj.weight")):
        return [half for matrix in matrices for half in matrix.chunk(2, dim=0)]
    return matrices
