"""GGUF files made by the `gguf` package as llama.cpp's converter lays them out (conversion/deepseek.py), from published
tensors: an oracle of its own for what our reader must undo."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter

from fireflyer.checkpoint.hf import stream_published
from fireflyer.model.decoder import Decoder

# 32 divides all that is quantised, and nothing is equal to anything else.
WIDTHS = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 64,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}

NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 64)
NEXTN = {
    "eh_proj": "eh_proj",
    "enorm": "enorm",
    "hnorm": "hnorm",
    "embed_tokens": "embed_tokens",
    "shared_head.norm": "shared_head_norm",
    "shared_head.head": "shared_head_head",
}


def gguf_tensors(model: Decoder, *, joined: bool = False, fused: bool = False) -> dict[str, np.ndarray]:
    """The model's tensors under the names of a `deepseek2` file; kv_b split unless joined, gate and up apart unless
    fused."""
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    config = model.config
    for name, tensor in stream_published(model):
        values = tensor.detach().float().numpy()
        if match := re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name):
            experts.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = values
        elif match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name) if _is_nextn(name) else None:
            tensors[f"blk.{match[1]}.nextn.{NEXTN[match[2]]}.weight"] = values
        elif name.endswith("kv_b_proj.weight") and not joined:
            heads = values.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, queries = np.split(heads, [config.qk_nope_head_dim], axis=1)
            tensors[_own(name.replace("kv_b", "k_b"))] = np.ascontiguousarray(keys.transpose(0, 2, 1))
            tensors[_own(name.replace("kv_b", "v_b"))] = np.ascontiguousarray(queries)
        else:
            tensors[_own(name.replace("e_score_correction_bias", "e_score_correction.bias"))] = values
    for name, stack in experts.items():
        tensors[_own(name)] = np.stack([stack[expert] for expert in sorted(stack)])
    for name in [name for name in tensors if fused and name.endswith("ffn_gate_exps.weight")]:
        up = tensors.pop(name.replace("gate", "up"))
        tensors[name.replace("gate", "gate_up")] = np.concatenate([tensors.pop(name), up], axis=1)
    return tensors


def _is_nextn(name: str) -> bool:
    return any(name.endswith(f".{part}.weight") and ".layers." in name for part in NEXTN)


def _own(name: str) -> str:
    own = NAMES.get_name(name, try_suffixes=(".weight", ".bias"))
    assert own is not None, name
    return own


def write_gguf(
    path: Path,
    model: Decoder,
    tensors: Mapping[str, np.ndarray] | None = None,
    kinds: Mapping[str, Kind] | Kind = Kind.F32,
    leave_out: tuple[str, ...] = (),
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """Write one file; the values that it holds, dequantised by the package.

    kinds: of all matrices, or by the end of a name (first match; others F32). leave_out: keys of the architecture.
    """
    tensors = gguf_tensors(model) if tensors is None else tensors
    writer = GGUFWriter(path, "deepseek2")
    _write_shape(writer, model, leave_out)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    values = {}
    for name, tensor in tensors.items():
        kind = (
            kinds if isinstance(kinds, Kind) else next((k for end, k in kinds.items() if name.endswith(end)), Kind.F32)
        )
        if tensor.ndim == 1 or "ffn_gate_inp" in name:
            kind = Kind.F32
        data = gguf.quants.quantize(tensor, kind)
        values[name] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _write_shape(writer: GGUFWriter, model: Decoder, leave_out: tuple[str, ...]) -> None:
    c = model.config
    depths = c.num_nextn_predict_layers
    pairs: list[tuple[str, Any]] = [
        ("block_count", c.num_hidden_layers + depths),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("feed_forward_length", c.intermediate_size),
        ("head_count", c.num_attention_heads),
        ("head_count_kv", 1),
        ("layer_norm_rms_eps", c.rms_norm_eps),
        ("rope_freq_base", c.rope_theta),
        ("rope_dimension_count", c.qk_rope_head_dim),
        ("leading_dense_block_count", c.first_k_dense_replace),
        ("vocab_size", c.vocab_size),
        ("kv_lora_rank", c.kv_lora_rank),
        ("key_length", c.kv_lora_rank + c.qk_rope_head_dim),
        ("value_length", c.kv_lora_rank),
        ("key_length_mla", c.qk_head_dim),
        ("value_length_mla", c.v_head_dim),
        ("expert_feed_forward_length", c.moe_intermediate_size),
        ("expert_count", c.n_routed_experts),
        ("expert_used_count", c.num_experts_per_tok),
        ("expert_shared_count", c.n_shared_experts),
        ("expert_group_count", c.n_group),
        ("expert_group_used_count", c.topk_group),
        ("expert_weights_scale", c.routed_scaling_factor),
        ("expert_weights_norm", c.norm_topk_prob),
        ("expert_gating_func", gguf.ExpertGatingFuncType[c.scoring_func.upper()]),
    ]
    if c.q_lora_rank is not None:
        pairs.append(("q_lora_rank", c.q_lora_rank))
    if depths:
        pairs.append(("nextn_predict_layers", depths))
    if c.rope_scaling is not None:
        pairs += [
            ("rope_scaling_type", gguf.RopeScalingType.YARN),
            ("rope_scaling_factor", c.rope_scaling.factor),
            ("rope_scaling_orig_ctx_len", c.rope_scaling.original_max_position_embeddings),
            ("rope_scaling_yarn_beta_fast", c.rope_scaling.beta_fast),
            ("rope_scaling_yarn_beta_slow", c.rope_scaling.beta_slow),
            ("rope_scaling_yarn_log_mul", 0.1 * c.rope_scaling.mscale_all_dim),
        ]
    for key, value in pairs:
        if key not in leave_out:
            getattr(writer, f"add_{key}")(value)


def published_values(model: Decoder, values: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What a file's values mean under the published names, undone by a naive loop."""
    out: dict[str, torch.Tensor] = {}
    config = model.config
    for name, original in stream_published(model):
        if match := re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(\w+)\.weight", name):
            own, expert = _own(f"{match[1]}.{match[3]}.weight"), int(match[2])
            if own not in values:
                both = values[re.sub("gate|up", "gate_up", own)][expert]
                half = both.shape[0] // 2
                out[name] = torch.from_numpy(both[:half] if match[3] == "gate_proj" else both[half:])
            else:
                out[name] = torch.from_numpy(values[own][expert])
        elif name.endswith("kv_b_proj.weight") and _own(name) not in values:
            keys, queries = (values[_own(name.replace("kv_b", part))] for part in ("k_b", "v_b"))
            heads = [np.concatenate([keys[h].T, queries[h]]) for h in range(config.num_attention_heads)]
            out[name] = torch.from_numpy(np.concatenate(heads))
        elif _is_nextn(name):
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
            assert match is not None
            out[name] = torch.from_numpy(values[f"blk.{match[1]}.nextn.{NEXTN[match[2]]}.weight"])
        else:
            own = _own(name.replace("e_score_correction_bias", "e_score_correction.bias"))
            out[name] = torch.from_numpy(values[own])
        assert out[name].shape == original.shape, name
    return out
