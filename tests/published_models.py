"""Tiny models of every family, made by transformers (the oracle) or by our own decoder, and a naive tensor listing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from fireflyer.config import ModelConfig
from fireflyer.model.decoder import Decoder, init_weights_

M = TypeVar("M", bound=torch.nn.Module)

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def yarn(factor: float, mscale: float, beta_fast: float = 32) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 16,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "v2": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 16.0,
        "rope_scaling": yarn(40, 0.707),
    },
    "v2-lite": {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_scaling": yarn(40, 0.707),
    },
    "v3": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "rope_scaling": yarn(4, 1.0)},
    "moonlight": {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 2.446},
    "k2": {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "rope_scaling": yarn(32, 1.0, beta_fast=1)},
}


def transformers_model(family: str) -> torch.nn.Module:
    """A random model of a family."""
    torch.manual_seed(0)
    settings = {**WIDTHS, **FAMILIES[family]}
    if family.startswith("v2"):
        return _tell_apart(DeepseekV2ForCausalLM(DeepseekV2Config(**settings)).eval())
    return _tell_apart(DeepseekV3ForCausalLM(DeepseekV3Config(**settings)).eval())


def own_config(**changes: Any) -> ModelConfig:
    """A tiny V3 with an MTP layer."""
    return ModelConfig.from_dict({**WIDTHS, **FAMILIES["v3"], "num_nextn_predict_layers": 1, **changes})


def own_model(**changes: Any) -> Decoder:
    model = Decoder(own_config(**changes))
    init_weights_(model, torch.Generator().manual_seed(7))
    return _tell_apart(model)


@torch.no_grad()
def _tell_apart(model: M) -> M:
    """Norms that differ, so that swapped ones show; gate biases below 0, which closed groups at 0 would show."""
    generator = torch.Generator().manual_seed(8)
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-1.5, -1.0, generator=generator)
    return model


def naive_listing(c: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes as the released files list them, written out from the listing and not from the code."""
    hidden, vocab, heads = c["hidden_size"], c["vocab_size"], c["num_attention_heads"]
    shapes = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = [vocab, hidden]
    for layer in range(c["num_hidden_layers"] + c.get("num_nextn_predict_layers", 0)):
        p = f"model.layers.{layer}."
        if layer >= c["num_hidden_layers"]:
            shapes[p + "embed_tokens.weight"] = [vocab, hidden]
            shapes[p + "enorm.weight"] = [hidden]
            shapes[p + "hnorm.weight"] = [hidden]
            shapes[p + "eh_proj.weight"] = [hidden, hidden * 2]
            shapes[p + "shared_head.norm.weight"] = [hidden]
            shapes[p + "shared_head.head.weight"] = [vocab, hidden]
        shapes[p + "input_layernorm.weight"] = [hidden]
        shapes[p + "post_attention_layernorm.weight"] = [hidden]
        q_rows = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        if c["q_lora_rank"]:
            shapes[p + "self_attn.q_a_proj.weight"] = [c["q_lora_rank"], hidden]
            shapes[p + "self_attn.q_a_layernorm.weight"] = [c["q_lora_rank"]]
            shapes[p + "self_attn.q_b_proj.weight"] = [q_rows, c["q_lora_rank"]]
        else:
            shapes[p + "self_attn.q_proj.weight"] = [q_rows, hidden]
        shapes[p + "self_attn.kv_a_proj_with_mqa.weight"] = [c["kv_lora_rank"] + c["qk_rope_head_dim"], hidden]
        shapes[p + "self_attn.kv_a_layernorm.weight"] = [c["kv_lora_rank"]]
        kv_rows = heads * (c["qk_nope_head_dim"] + c["v_head_dim"])
        shapes[p + "self_attn.kv_b_proj.weight"] = [kv_rows, c["kv_lora_rank"]]
        shapes[p + "self_attn.o_proj.weight"] = [hidden, heads * c["v_head_dim"]]
        feed_forwards = {p + "mlp.": c["intermediate_size"]}
        if layer >= c["first_k_dense_replace"]:
            width = c["moe_intermediate_size"]
            feed_forwards = {p + f"mlp.experts.{e}.": width for e in range(c["n_routed_experts"])}
            if c["n_shared_experts"]:
                feed_forwards[p + "mlp.shared_experts."] = c["n_shared_experts"] * width
            shapes[p + "mlp.gate.weight"] = [c["n_routed_experts"], hidden]
            if c.get("topk_method", "noaux_tc") == "noaux_tc":
                shapes[p + "mlp.gate.e_score_correction_bias"] = [c["n_routed_experts"]]
        for q, width in feed_forwards.items():
            shapes[q + "gate_proj.weight"] = [width, hidden]
            shapes[q + "up_proj.weight"] = [width, hidden]
            shapes[q + "down_proj.weight"] = [hidden, width]
    return shapes


def files_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors by the library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
