"""The decoder with packed weights: a configuration and a format in, a Decoder whose large matrices are blocks of bytes.

What chooses or normalises stays exact: gate, gate bias and norms are fp32, and so are hidden states. The latent's down
projections are never under 8 bits and its expansion is bf16 (low-bit ones break long contexts: llama.cpp issues 11446
and 12801); the embedding is bf16, since a step reads but one row of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fireflyer.config import ModelConfig
from fireflyer.config.published import PACKED
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import MoE
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.numerics.integer import Kind
from fireflyer.numerics.linear import NarrowLinear, PackedLinear

KINDS: tuple[Kind, ...] = ("int8", "int4")
_VERSION = 1
_LATENT = ("q_a_proj", "kv_a_proj_with_mqa")


@dataclass(frozen=True)
class PackedFormat:
    """Which kind each part of the model is packed as. `weights` is what the whole is called by."""

    weights: Kind
    latent: Kind = "int8"
    head: Kind = "int8"

    def to_dict(self) -> dict[str, Any]:
        """`quantization_config` of config.json: everything that a reader needs, in words."""
        return {
            "quant_method": PACKED,
            "version": _VERSION,
            "weights": self.weights,
            "latent_projections": self.latent,
            "head": self.head,
            "kv_b_proj": "bf16",
            "embedding": "bf16",
            "gate": "fp32",
        }

    @classmethod
    def from_dict(cls, found: dict[str, Any], source: str) -> PackedFormat:
        """The reverse. Raises UserError, naming `source`."""
        wanted = [found.get(key) for key in ("weights", "latent_projections", "head")]
        if all(kind in KINDS for kind in wanted):
            fmt = cls(*wanted)  # pyright: ignore[reportArgumentType]
            if fmt.to_dict() == found:
                return fmt
        raise UserError(f"{source}: quantization_config {found} isn't a packed format of this version; convert it anew")


def packed_decoder(config: ModelConfig, fmt: PackedFormat) -> Decoder:
    """A Decoder of this format on the meta device: no memory, until each of its tensors is put in its place."""
    with torch.device("meta"):
        model = Decoder(config)
        for parent in list(model.modules()):
            if isinstance(parent, MoE):
                parent.experts = PackedExperts(config, fmt.weights)
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(parent, name, _packed_layer(name, layer, fmt))
        # Also where the embedding serves as head: the one is read by rows, the other whole at every step.
        model.lm_head = PackedLinear(config.vocab_size, config.hidden_size, fmt.head)
        model.model.embed_tokens.to(torch.bfloat16)
    return model.requires_grad_(False)


def _packed_layer(name: str, layer: nn.Linear, fmt: PackedFormat) -> nn.Module:
    if name == "kv_b_proj":
        return NarrowLinear(layer.out_features, layer.in_features)
    kind = fmt.latent if name in _LATENT else fmt.weights
    return PackedLinear(layer.out_features, layer.in_features, kind)
