"""How many parameters a config has, part by part, and what its cache weighs: arithmetic, no torch.

In: a ModelConfig. Out: counts of numbers (the gate biases included, as the published checkpoints hold them). The sums
match the tensor listings of the released checkpoints of V2-Lite, V2, V3, Moonlight and Kimi-K2. V3 report, section 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of one model. `total` and `active` are the main model's, without the MTP modules.

    `active` takes part in computing one token: it counts the output head, and not the embedding, which is a look-up.
    `mtp` is all depths' own parameters, eh_proj included; `mtp_active` those that one token uses, with the shared head.
    `checkpoint` is what the published files hold: each MTP layer carries copies of the embedding and of the head.
    """

    embedding: int
    head: int
    attention_layer: int
    dense_ffn_layer: int
    routed_expert: int
    shared_experts: int
    router: int
    moe_ffn_layer: int
    total: int
    active: int
    mtp: int
    mtp_active: int
    checkpoint: int


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """All counts of a config."""
    hidden, layers, depths = config.hidden_size, config.num_hidden_layers, config.num_nextn_predict_layers
    embedding = config.vocab_size * hidden
    head = 0 if config.tie_word_embeddings else embedding
    attention = _attention(config)
    dense = _swiglu(hidden, config.intermediate_size)
    expert = _swiglu(hidden, config.moe_intermediate_size)
    shared = config.n_shared_experts * expert
    gate_bias = config.n_routed_experts if config.topk_method == "noaux_tc" else 0
    router = config.n_routed_experts * hidden + gate_bias
    moe = router + shared + config.n_routed_experts * expert
    moe_active = router + shared + config.num_experts_per_tok * expert

    def block(index: int, moe_ffn: int) -> int:
        norms = 2 * hidden
        return norms + attention + (moe_ffn if config.is_moe(index) else dense)

    norm = hidden
    mtp_joint = 3 * norm + 2 * hidden * hidden
    main, main_active = (norm + sum(block(i, ffn) for i in range(layers)) for ffn in (moe, moe_active))
    mtp, mtp_active = (depths * (mtp_joint + block(layers, ffn)) for ffn in (moe, moe_active))
    total = embedding + head + main
    return ParameterCounts(
        embedding=embedding,
        head=head,
        attention_layer=attention,
        dense_ffn_layer=dense,
        routed_expert=expert,
        shared_experts=shared,
        router=router,
        moe_ffn_layer=moe,
        total=total,
        active=main_active + embedding,
        mtp=mtp,
        mtp_active=mtp_active + depths * embedding,
        checkpoint=total + mtp + depths * 2 * embedding,
    )


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes that decoding remembers per token, in all main layers: the normalised latent and the rotated rope key."""
    return config.latent_dim * config.num_hidden_layers * bytes_per_number


def _attention(config: ModelConfig) -> int:
    """Latent attention with its latent norms. V3 report, equations 1-11."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    query = heads * config.qk_head_dim
    rank = config.q_lora_rank
    queries = hidden * query if rank is None else rank * (hidden + 1 + query)
    keys_and_values = config.kv_lora_rank * (1 + heads * (config.qk_nope_head_dim + config.v_head_dim))
    return queries + hidden * config.latent_dim + keys_and_values + heads * config.v_head_dim * hidden


def _swiglu(hidden: int, width: int) -> int:
    return 3 * hidden * width
