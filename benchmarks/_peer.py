"""The model that speeds are compared on, ours and the same weights in transformers.

12.1 million parameters, 5.2 million of them active: DeepSeek-V3's architecture in small, without MTP, which the peer
neither trains nor, at this depth, speculates with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fireflyer import save_model
from fireflyer.config import ModelConfig
from fireflyer.model.decoder import Decoder, init_weights_

_SHAPE: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def small_model(seed: int = 0) -> Decoder:
    """Ours, with random weights: the same for a seed in every process."""
    model = Decoder(ModelConfig.from_dict(_SHAPE, source="the benchmark's shape"))
    init_weights_(model, torch.Generator().manual_seed(seed))
    return model


def transformers_model(folder: Path, experts: str, seed: int = 0) -> Any:
    """The same weights as `transformers` loads them from a checkpoint of ours, written to `folder`.

    experts: its implementation of the routed experts, "eager" or "grouped_mm".
    """
    from transformers import DeepseekV3ForCausalLM

    save_model(small_model(seed), folder)
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation=experts)
