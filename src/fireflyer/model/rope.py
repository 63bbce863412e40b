"""Rotary positions: positions in, cosines and sines and rotated tensors out; YaRN and its softmax scale (report 4.3).

YaRN corrects two separate things, and the usual bugs do one of them or both twice:
the softmax scale is multiplied by m² with m from `mscale_all_dim`; the amplitude of cos and sin is the quotient of the
factors for `mscale` and `mscale_all_dim`, which is 1 in every released DeepSeek model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fireflyer.config import ModelConfig, RopeScaling
from fireflyer.model.norm import at_least_fp32


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1, the temperature √t of the reports; 1 where nothing is extended."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """What the attention logits are multiplied by: (P + R)^-½ · m². V3: 192^-½ · 1.3688879² = 0.1352338."""
    scale = config.qk_head_dim**-0.5
    scaling = config.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def rope_amplitude(scaling: RopeScaling | None) -> float:
    """What cos and sin are multiplied by; 1 wherever mscale equals mscale_all_dim."""
    if scaling is None:
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    return yarn_mscale(scaling.factor, 1.0)


def yarn_correction_range(scaling: RopeScaling, dim: int, theta: float) -> tuple[int, int]:
    """The pairs between which YaRN blends: (first, last), as whole numbers. V3: (10, 23) of 32 pairs."""

    def pair_of(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    first = math.floor(pair_of(scaling.beta_fast))
    last = math.ceil(pair_of(scaling.beta_slow))
    return max(first, 0), min(last, dim - 1)


def rope_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each rotated pair: (R/2,) fp32.

    In single precision on purpose, as the published code computes them: the released weights were trained so, and at
    position 160,000 the rounding of a frequency is a visible angle.
    """
    dim = config.qk_rope_head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    first, last = yarn_correction_range(scaling, dim, config.rope_theta)
    width = last - first if last != first else 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32, device=device) - first) / width).clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def rope_cos_sin(frequencies: Tensor, positions_BT: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (B, T, R/2) fp32."""
    angles = positions_BT[..., None].float() * frequencies
    return angles.cos() * amplitude, angles.sin() * amplitude


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1), (x2, x3), …, the layout of every released DeepSeek checkpoint.

    Args:
        x: (..., R).
        cos, sin: broadcastable to (..., R/2).

    Returns:
        The same shape and dtype as `x`; the arithmetic is fp32, or fp64 for fp64.
    """
    wide = at_least_fp32(x)
    # One complex product is a third of the time with its backward. Without gradients the composed form stays, which
    # rounds every element alike wherever it stands; the compiler fuses that, and knows no complex numbers. A call of
    # many layers turns by `turn_pairs`.
    if not x.requires_grad or torch.compiler.is_compiling():
        even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
    if wide.storage_offset() % 2 or any(stride % 2 for stride in wide.stride()[:-1]):
        wide = wide.contiguous()  # a pair can be seen as a complex number where it begins at an even place
    turned = torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def pair_factors(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `turn_pairs` takes: (..., R) factors of each number and of its neighbour, and (R,) where that stands."""
    own = cos.repeat_interleave(2, dim=-1)
    neighbour = torch.stack((-sin, sin), dim=-1).flatten(-2)
    return own, neighbour, torch.arange(own.shape[-1], device=cos.device) ^ 1


def turn_pairs(x: Tensor, own: Tensor, neighbour: Tensor, place_R: Tensor) -> Tensor:
    """`apply_rope` to the bit, in a third of the time, once a call's layers share the factors. Not for training."""
    wide = at_least_fp32(x)
    return (wide * own + wide.index_select(-1, place_R) * neighbour).to(x.dtype)
