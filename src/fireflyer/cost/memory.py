"""What weights weigh on disk, and what a decode step has to read of them: arithmetic, no torch.

In: a ModelConfig. Out: bytes of the published tensors (without the files' headers). V3's FP8 checkpoint has
688,574,839,360. README_WEIGHTS.md of the V3 release describes the format.
"""

from __future__ import annotations

from collections.abc import Sequence

from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import cache_bytes_per_token, count_parameters

_BLOCK = 128


def bf16_checkpoint_bytes(config: ModelConfig) -> int:
    """Everything in BF16, the gate biases in FP32."""
    return 2 * count_parameters(config).checkpoint + 2 * _num_gate_biases(config)


def fp8_checkpoint_bytes(config: ModelConfig) -> int:
    """The layers' matrices in E4M3 with an FP32 scale per 128 x 128 block, the rest as in BF16.

    Embedding, head, gates, norms and the MTP's eh_proj stay in BF16, as published.
    """
    saved = sum(count * _saved_bytes(rows, columns) for count, rows, columns in _fp8_matrices(config))
    return bf16_checkpoint_bytes(config) - saved


def decode_step_bytes(
    config: ModelConfig,
    context_lengths: Sequence[int],
    *,
    experts_per_layer: float | None = None,
    bytes_per_weight: float = 2,
    bytes_per_cached: float = 2,
) -> float:
    """Bytes that one decode step of the main model must read at least: what bounds its speed beside the memory's.

    Args:
        context_lengths: tokens in each sequence's cache; one entry a sequence of the batch.
        experts_per_layer: distinct routed experts that a layer uses for the whole batch, its mean as measured;
            None: num_experts_per_tok, which is exact for one sequence.
        bytes_per_weight, bytes_per_cached: of one number as stored.
    """
    counts = count_parameters(config)
    used = config.num_experts_per_tok if experts_per_layer is None else experts_per_layer
    moe_layers = sum(config.is_moe(index) for index in range(config.num_hidden_layers))
    weights = counts.active + moe_layers * (used - config.num_experts_per_tok) * counts.routed_expert
    cached = sum(context_lengths) * cache_bytes_per_token(config, 1)
    return weights * bytes_per_weight + cached * bytes_per_cached


def _num_gate_biases(config: ModelConfig) -> int:
    if config.topk_method != "noaux_tc":
        return 0
    return _num_moe_layers(config) * config.n_routed_experts


def _num_moe_layers(config: ModelConfig) -> int:
    return sum(config.is_moe(index) for index in range(config.num_layers_with_mtp))


def _saved_bytes(rows: int, columns: int) -> int:
    """What one matrix saves against BF16."""
    scales = -(-rows // _BLOCK) * -(-columns // _BLOCK)
    return rows * columns - 4 * scales


def _fp8_matrices(config: ModelConfig) -> list[tuple[int, int, int]]:
    """(how many, rows, columns) of every matrix kept in FP8, in the published layout."""
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_layers_with_mtp
    moe = _num_moe_layers(config)
    shapes = [
        (layers, config.latent_dim, hidden),
        (layers, heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (layers, hidden, heads * config.v_head_dim),
    ]
    if config.q_lora_rank is None:
        shapes.append((layers, heads * config.qk_head_dim, hidden))
    else:
        shapes += [(layers, config.q_lora_rank, hidden), (layers, heads * config.qk_head_dim, config.q_lora_rank)]
    for count, width in (
        (layers - moe, config.intermediate_size),
        (moe * config.n_routed_experts, config.moe_intermediate_size),
        (moe * min(config.n_shared_experts, 1), config.n_shared_experts * config.moe_intermediate_size),
    ):
        shapes += [(2 * count, width, hidden), (count, hidden, width)]
    return shapes
