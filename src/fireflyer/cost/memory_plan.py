"""Bytes that training holds on one rank: weights, gradients, optimizer, activations, passing buffers. No torch.

V3 report, section 3.3: FP32 master weights and gradients, BF16 moments, matrices in FP8 or BF16; cached activations in
FP8, the attention's output in 12 bits (E5M6), SwiGLU's input in FP8. With BF16 training each number has two bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import ParameterCounts
from fireflyer.cost.stages import RankLayers

_MASTER_AND_MOMENTS = 4 + 2 + 2
_GRADIENT = 4
_FP8_WEIGHT = 1 + 4 / 128**2
"""An FP8 number with its share of the FP32 scale of a 128 x 128 block."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Spread:
    """How a rank's share is stored: `data_ranks` is dp x cp; experts have data_ranks / ep copies.

    A rank has `stages_each` stages; `chunks_held` chunks, micro-batches through one stage, wait for their backward.
    """

    precision: str
    recompute: str
    zero: int
    data_ranks: int
    ep: int
    tokens: int
    stages_each: int
    chunks_held: float


@dataclass(frozen=True)
class RankParameters:
    """Numbers on one rank: matrices that may be in FP8 (`dense`, and `experts` spread by ep), and the rest."""

    dense: int
    experts: int
    plain: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.plain


def rank_parameters(config: ModelConfig, counts: ParameterCounts, layers: RankLayers, ep: int) -> RankParameters:
    """What a rank holds before any sharding over data ranks. An MTP module shares embedding and head; where the head is
    and the embedding isn't, the rank has a copy of the embedding for it."""
    hidden = config.hidden_size
    norms = 2 * hidden
    depths = config.num_nextn_predict_layers if layers.tail else 0
    moe_mtp = config.is_moe(config.num_hidden_layers)
    dense_layers = layers.dense + (0 if moe_mtp else depths)
    moe_layers = layers.moe + (depths if moe_mtp else 0)
    dense = (dense_layers + moe_layers) * counts.attention_layer
    dense += dense_layers * counts.dense_ffn_layer + moe_layers * counts.shared_experts
    plain = (dense_layers + moe_layers) * norms + moe_layers * counts.router
    if layers.tail:
        plain += (counts.head or counts.embedding) + hidden + depths * (3 * hidden + 2 * hidden * hidden)
    tied_here = layers.tail and not counts.head
    if (layers.embedding or depths) and not tied_here:
        plain += counts.embedding
    experts = moe_layers * (config.n_routed_experts // ep) * counts.routed_expert
    return RankParameters(dense, experts, plain)


def rank_memory(config: ModelConfig, layers: RankLayers, parameters: RankParameters, spread: Spread) -> Memory:
    """Everything on one rank while its fullest moment lasts."""
    alike, expert_copies = spread.data_ranks, spread.data_ranks // spread.ep
    size = _FP8_WEIGHT if spread.precision == "fp8" else 2.0

    def sharded(at_zero: int, per_matrix: float, per_plain: float) -> float:
        """Bytes of a kind that is shared out from that ZeRO stage on."""
        over, over_experts = (alike, expert_copies) if spread.zero >= at_zero else (1, 1)
        experts = parameters.experts * per_matrix / over_experts
        return (parameters.dense * per_matrix + parameters.plain * per_plain) / over + experts

    weights = sharded(3, size, 2.0)
    if spread.zero >= 3:
        num_layers = max(1, layers.dense + layers.moe)
        weights += 2 * (parameters.dense + parameters.experts) * size / num_layers  # one in use, the next on its way
    held = layers.dense * layer_activations(config, spread, moe=False) + layers.moe * layer_activations(
        config, spread, moe=True
    )
    activations = spread.tokens * held / spread.stages_each * spread.chunks_held
    return Memory(
        weights=weights,
        gradients=sharded(2, _GRADIENT, _GRADIENT),
        optimizer=sharded(1, _MASTER_AND_MOMENTS, _MASTER_AND_MOMENTS),
        activations=activations + _tail_activations(config, layers, spread),
        buffers=_buffers(config, layers, spread),
    )


def layer_activations(config: ModelConfig, spread: Spread, moe: bool) -> float:
    """Bytes per token that a layer keeps for its backward."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if spread.recompute == "full":
        return 2.0 * hidden
    fp8 = spread.precision == "fp8"
    number, attended = (1.0, 1.5) if fp8 else (2.0, 2.0)
    latents = config.latent_dim + (config.q_lora_rank or 0)
    kept = 2 * 2.0 * hidden + 2.0 * latents + attended * heads * config.v_head_dim + 4.0 * heads
    width, slots = config.intermediate_size, 1
    if moe:
        width, slots = config.moe_intermediate_size, config.num_experts_per_tok + config.n_shared_experts
        kept += 4.0 * config.n_routed_experts + number * config.num_experts_per_tok * hidden
    kept += number * slots * 2 * width
    if spread.recompute == "none":
        up = heads * (config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim)
        kept += 2 * number * hidden + number * latents + 2.0 * up + number * slots * width
    return kept


def _tail_activations(config: ModelConfig, layers: RankLayers, spread: Spread) -> float:
    """The MTP modules' layer and joint input, and the heads' inputs; their backward follows at once."""
    if not layers.tail:
        return 0.0
    depths, hidden = config.num_nextn_predict_layers, config.hidden_size
    of_a_depth = layer_activations(config, spread, config.is_moe(config.num_hidden_layers)) + 2.0 * 2 * hidden
    return spread.tokens * (depths * of_a_depth + (1 + depths) * 2.0 * hidden)


def _buffers(config: ModelConfig, layers: RankLayers, spread: Spread) -> float:
    """What passes: one layer's numbers at work (forward and gradient, BF16); on the tail logits and their gradient."""
    slots = config.num_experts_per_tok + config.n_shared_experts if layers.moe else 1
    width = config.moe_intermediate_size if layers.moe else config.intermediate_size
    heads = config.num_attention_heads
    attention = heads * (config.qk_head_dim + config.qk_nope_head_dim + 2 * config.v_head_dim)
    at_work = max(attention, slots * (config.hidden_size + 3 * width))
    logits = (2.0 + 4.0) * config.vocab_size if layers.tail else 0.0
    return spread.tokens * max(2 * 2.0 * at_work, logits)
