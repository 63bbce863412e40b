"""Bytes that training takes of a machine's memory: one process of this package's own loop. No torch.

In: a ModelConfig and how it is trained. Out: bytes by what they are for, and their peak. The activations are counted
over what autograd keeps in this decoder (model/attention.py, experts.py, norm.py), number by number.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import count_parameters

PROCESS = 330 * 2**20
"""Python, torch and the package itself, before a model is there."""

_FP32 = 4
_INDEX = 8
_LOGITS = 3 * 16 * 2**20
"""The logits of a chunk of the head, their probabilities and the gradient (train/losses.py)."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes; `saving` is the copy of a checkpoint while it is written, `average` that of the weights' running mean."""

    weights: int
    gradients: int
    moments: int
    average: int
    saving: int
    activations: int
    working: int
    gradients_beside: bool
    """Whether all gradients are there while activations are: with more than one micro-batch."""

    @property
    def total(self) -> int:
        """The peak of the process. Gradients of one batch at once come as its activations go."""
        state = PROCESS + self.weights + self.moments + self.average + self.saving
        if self.gradients_beside:
            return state + self.gradients + self.activations + self.working
        return state + max(self.gradients, self.activations + self.working)


def training_memory(
    config: ModelConfig,
    *,
    rows: int,
    seq_len: int,
    micro_batches: int = 1,
    recompute: bool = False,
    average: bool = False,
    moments: int = 2,
    bytes_per_operand: int = 4,
) -> TrainingMemory:
    """What a run takes at its fullest moment.

    Args:
        rows: sequences of one forward pass.
        micro_batches: forward passes of a step.
        recompute: only each layer's input is kept.
        average: whether a running mean of the weights is kept.
        moments: numbers that the optimizer keeps of each weight: AdamW's 2, Muon's 1.
        bytes_per_operand: of what matrix products read: 4 in fp32, 2 in bf16.
    """
    counts = count_parameters(config)
    weights = _FP32 * (counts.total + counts.mtp)
    tokens, hidden = rows * seq_len, config.hidden_size
    heads = 1 + config.num_nextn_predict_layers
    layers = [
        layer_bytes_per_token(config, moe=config.is_moe(index), bytes_per_operand=bytes_per_operand)
        for index in range(config.num_layers_with_mtp)
    ]
    # A layer that is computed again is there twice over for a moment: what it kept, and the gradients of that.
    kept = sum(layers) if not recompute else len(layers) * _FP32 * hidden + 2 * max(layers)
    # Each head's input and its gradient; of a depth also its two normed inputs side by side and what it begins with.
    kept += heads * 2 * _FP32 * hidden + (heads - 1) * (2 * bytes_per_operand + 2 * _FP32) * hidden
    head_gradients = heads * _FP32 * config.vocab_size * hidden
    casts = 0 if bytes_per_operand == _FP32 else bytes_per_operand * weights // _FP32
    return TrainingMemory(
        weights=weights,
        gradients=weights,
        moments=moments * weights,
        average=weights if average else 0,
        saving=(1 + moments + average) * weights,
        activations=tokens * kept + head_gradients + casts,
        working=max(_LOGITS, tokens * _working_bytes_per_token(config)),
        gradients_beside=micro_batches > 1,
    )


def layer_bytes_per_token(config: ModelConfig, *, moe: bool, bytes_per_operand: int = 4) -> int:
    """What a layer keeps of a token for its backward: operands of matrix products and of attention, and fp32 beside."""
    hidden, heads, rope = config.hidden_size, config.num_attention_heads, config.qk_rope_head_dim
    width = max(config.qk_head_dim, config.v_head_dim)
    operands = 2 * hidden + 2 * (config.q_lora_rank or 0) + config.latent_dim + config.kv_lora_rank
    # Queries, keys, what is read; values filled up to that width and the result cut again, or beside the keys.
    filled = config.v_head_dim < width
    operands += heads * (3 * width + config.v_head_dim + (width if filled else config.qk_nope_head_dim))
    plain = 2 * hidden + 2 * rope + heads + 4
    indices = 0
    if moe:
        top_k, experts = config.num_experts_per_tok, config.n_routed_experts
        operands += top_k * (hidden + 3 * config.moe_intermediate_size)
        operands += 3 * config.n_shared_experts * config.moe_intermediate_size
        plain += experts + 3 * top_k + 1
        indices = experts + 3 * top_k
    else:
        operands += 3 * config.intermediate_size
    return bytes_per_operand * operands + _FP32 * plain + _INDEX * indices


def _working_bytes_per_token(config: ModelConfig) -> int:
    """The gradients within one layer, while its backward runs."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = max(config.qk_head_dim, config.v_head_dim)
    attention = 4 * heads * width + heads * (config.qk_nope_head_dim + config.v_head_dim)
    wide, slots = config.intermediate_size, 1
    if config.n_routed_experts:
        wide, slots = config.moe_intermediate_size, config.num_experts_per_tok
    return _FP32 * (2 * hidden + max(attention, slots * (hidden + 4 * wide)))
