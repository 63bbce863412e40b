"""What a GGUF file's metadata say of a DeepSeek model, as a ModelConfig.

In: a file of llama.cpp's architecture `deepseek2`, opened. Out: its config, as published files have it. What the
metadata don't hold is read off the tensors: query latents, a tied head, MTP layers, gate biases.
conversion/deepseek.py of llama.cpp writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fireflyer.checkpoint.gguf_file import GET_ALL, GGUF
from fireflyer.config import ModelConfig
from fireflyer.config.files import PRESETS, read_json
from fireflyer.config.messages import shown
from fireflyer.errors import UserError

ARCHITECTURE = "deepseek2"


def config_from_gguf(file: GGUF) -> ModelConfig:
    """The config of a file's model. Raises UserError for another architecture, or a value that is missing or can't be
    honoured."""
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(
            f"{file.path}: architecture {shown(architecture)} isn't supported; only {ARCHITECTURE} is (DeepSeek-V2, V3,"
            " R1, Moonlight, Kimi-K2)"
        )
    return ModelConfig.from_dict(_published(file), source=str(file.path))


def _published(file: GGUF) -> dict[str, Any]:
    """The metadata as a published config.json."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{file.path}: token_embd.weight isn't in it; {GET_ALL}")
    need, given = _reader(file)
    depths = given("nextn_predict_layers", 0)
    layers = need("block_count") - depths
    if f"blk.{layers}.nextn.eh_proj.weight" not in file.tensors:
        depths = 0
    rope, experts = need("rope.dimension_count"), given("expert_count", 0)
    bias = any(name.endswith("exp_probs_b.bias") for name in file.tensors)
    sigmoid = given("expert_gating_func", 2 if bias else 1) == 2
    published = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "vocab_size": embedding.shape[0],
        "hidden_size": need("embedding_length"),
        "intermediate_size": _one(file, "feed_forward_length", need("feed_forward_length")),
        "moe_intermediate_size": _one(file, "expert_feed_forward_length", given("expert_feed_forward_length", 1)),
        "num_hidden_layers": layers,
        "first_k_dense_replace": given("leading_dense_block_count", 0),
        "num_attention_heads": _one(file, "attention.head_count", need("attention.head_count")),
        "q_lora_rank": None if "blk.0.attn_q.weight" in file.tensors else need("attention.q_lora_rank"),
        "kv_lora_rank": need("attention.kv_lora_rank"),
        "qk_nope_head_dim": (given("attention.key_length_mla", None) or need("attention.key_length")) - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": given("attention.value_length_mla", None) or need("attention.value_length"),
        "n_routed_experts": experts,
        "n_shared_experts": given("expert_shared_count", 0),
        "num_experts_per_tok": given("expert_used_count", 0),
        "routed_scaling_factor": given("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": given("expert_weights_norm", False),
        "scoring_func": "sigmoid" if sigmoid else "softmax",
        "rope_theta": given("rope.freq_base", 10000.0),
        "rope_scaling": _yarn(file),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "num_nextn_predict_layers": depths,
        **_end_tokens(file),
    }
    groups, open_groups = _groups(published, given("expert_group_count", None), given("expert_group_used_count", None))
    method = "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy"
    return published | {"n_group": groups, "topk_group": open_groups, "topk_method": method}


def _reader(file: GGUF) -> tuple[Callable[[str], Any], Callable[[str, Any], Any]]:
    """Two functions: a value of the architecture that must be there, and one that may be absent."""

    def given(key: str, default: Any) -> Any:
        return file.metadata.get(f"{ARCHITECTURE}.{key}", default)

    def need(key: str) -> Any:
        value = given(key, None)
        if value is None:
            raise UserError(f"{file.path}: its metadata has no {ARCHITECTURE}.{key}; {GET_ALL}")
        return value

    return need, given


def _one(file: GGUF, key: str, value: Any) -> Any:
    """A width that may be listed layer by layer, 0 where a layer has none of the kind."""
    if not isinstance(value, list):
        return value
    widths = set(value) - {0} or {0}
    if len(widths) > 1:
        raise UserError(f"{file.path}: {ARCHITECTURE}.{key} differs by layer ({shown(value)}), which isn't supported")
    return widths.pop()


def _yarn(file: GGUF) -> dict[str, Any] | None:
    need, given = _reader(file)
    kind = given("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise UserError(f"{file.path}: {ARCHITECTURE}.rope.scaling.type {shown(kind)} isn't supported; only yarn is")
    yarn = {
        "type": "yarn",
        "factor": need("rope.scaling.factor"),
        "original_max_position_embeddings": need("rope.scaling.original_context_length"),
        "beta_fast": given("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": given("rope.scaling.yarn_beta_slow", 1.0),
    }
    multiplier = given("rope.scaling.yarn_log_multiplier", None)
    if multiplier is not None:
        # A tenth of mscale_all_dim. mscale isn't kept: llama.cpp takes it to be equal, as in all released models.
        yarn["mscale"] = yarn["mscale_all_dim"] = round(10 * multiplier, 6)
    return yarn


def _groups(published: dict[str, Any], groups: int | None, open_groups: int | None) -> tuple[int, int]:
    """(n_group, topk_group). Files made before llama.cpp knew of groups leave them out: those of a released model are
    then what its config.json says, since without them other experts would be chosen."""
    if groups is not None:
        return groups, open_groups or groups
    shape = ("hidden_size", "num_hidden_layers", "n_routed_experts", "num_attention_heads")
    for preset in sorted(PRESETS.glob("*.json")):
        released = read_json(preset)
        if all(released.get(key) == published[key] for key in shape):
            return released.get("n_group") or 1, released.get("topk_group") or 1
    return 1, 1


def _end_tokens(file: GGUF) -> dict[str, Any]:
    bos, eos, eot, pad = (
        file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding")
    )
    ends = list(dict.fromkeys(token for token in (eos, eot) if token is not None))
    tokens = {"bos_token_id": bos, "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": pad}
    return {key: value for key, value in tokens.items() if value is not None}
