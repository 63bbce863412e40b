"""The published config.json and ModelConfig's fields, one to the other: spellings, defaults, refusals.

In: the dictionary of a published file; out: the fields of ModelConfig (and back). Keys whose one right value is fixed
are checked and dropped, harmless ones carried along in `extra`, any other refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fireflyer.config.messages import nearest, shown
from fireflyer.errors import UserError

PACKED = "fireflyer"
"""`quant_method` of folders whose weights are packed as integers here."""

_FIXED = {
    "hidden_act": ("silu", "the experts and feed-forwards are SwiGLU"),
    "attention_bias": (False, "the projections have no bias"),
    "mlp_bias": (False, "the projections have no bias"),
    "attention_dropout": (0, "the model has no dropout"),
    "moe_layer_freq": (1, "every layer from first_k_dense_replace on has experts"),
    "rope_interleave": (True, "published weights rotate interleaved pairs"),
    "use_mla": (True, "attention is over latents"),
}

# Facts about the files or the writer, which whoever writes them states anew.
_DROPPED = {"architectures", "auto_map", "torch_dtype", "dtype", "transformers_version"}
_DERIVED = {"num_key_value_heads", "qk_head_dim", "head_dim"}

_CARRIED = """use_cache ep_size pretraining_tp aux_loss_alpha seq_aux router_aux_loss_coef output_router_logits
    attn_implementation gradient_checkpointing model_max_length tokenizer_class prefix problem_type finetuning_task
    id2label label2id task_specific_params return_dict return_dict_in_generate output_hidden_states output_attentions
    output_scores torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward is_encoder_decoder
    is_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens max_new_tokens""".split()

_KNOWN = {*_FIXED, *_DROPPED, *_DERIVED, *_CARRIED, "rope_parameters", "num_mtp_layers"}

_DISTILL = "a {} model (the R1 distills are such), not DeepSeek-V3"
_OTHER_MODELS = {
    "deepseek": "the first DeepSeek MoE has no latent attention",
    "deepseek_v32": "DeepSeek-V3.2 has sparse attention behind an indexer",
    "deepseek_v4": "DeepSeek-V4 has no latent attention and other residual connections",
    "qwen2": _DISTILL.format("Qwen"),
    "qwen3": _DISTILL.format("Qwen"),
    "qwen3_moe": _DISTILL.format("Qwen"),
    "llama": _DISTILL.format("Llama"),
    "deepseek_vl_v2": "a vision model around a language model",
    "kimi_vl": "a vision model around a language model",
    "kimi_k25": "a vision model around a language model",
}
_MODELS = ("deepseek_v2", "deepseek_v3", "kimi_k2")


def from_published(published: dict[str, Any], field_names: Collection[str], source: str) -> dict[str, Any]:
    """The fields of ModelConfig, `rope_scaling` still a dictionary; values yet unchecked. Raises UserError."""
    given = {key: value for key, value in published.items() if value is not None}
    model_type = _check_model_type(given, source)
    names = set(field_names) - {"extra"}
    _check_keys(given, names, source)
    fields = {key: given[key] for key in names if key in given}
    fields["model_type"] = model_type
    if "num_mtp_layers" in given:
        fields.setdefault("num_nextn_predict_layers", given["num_mtp_layers"])
    _set_defaults(fields, published)
    _check_head_widths(given, source)
    _check_quantization(given.get("quantization_config"), source)
    fields["rope_theta"], fields["rope_scaling"] = _rope(given, source)
    fields["extra"] = {key: value for key, value in given.items() if key in _CARRIED}
    return fields


def _set_defaults(fields: dict[str, Any], published: dict[str, Any]) -> None:
    """What an absent key means, or one given as null."""
    is_v2 = fields["model_type"] == "deepseek_v2"
    fields.setdefault("scoring_func", "softmax" if is_v2 else "sigmoid")
    fields.setdefault("topk_method", "greedy" if is_v2 else "noaux_tc")
    fields.setdefault("norm_topk_prob", not is_v2)
    if published.get("q_lora_rank", 1) in (None, 0):
        fields["q_lora_rank"] = None
    for count in ("n_shared_experts", "n_routed_experts"):
        if count in published:
            fields.setdefault(count, 0)
    if fields.get("n_routed_experts") == 0:
        for key, unused in (("num_experts_per_tok", 0), ("moe_intermediate_size", 1), ("routed_scaling_factor", 1.0)):
            fields.setdefault(key, unused)


def to_published(fields: dict[str, Any]) -> dict[str, Any]:
    """ModelConfig's fields (dumped) as the published dictionary, keys in alphabetical order."""
    fields = dict(fields)
    published = fields.pop("extra") | fields
    is_v2 = fields["model_type"] == "deepseek_v2"
    published["architectures"] = ["DeepseekV2ForCausalLM" if is_v2 else "DeepseekV3ForCausalLM"]
    published |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1}
    published["num_key_value_heads"] = fields["num_attention_heads"]
    if fields["rope_scaling"] is not None:
        published["rope_scaling"] = fields["rope_scaling"] | {"type": "yarn"}
    if fields["quantization_config"] is None:
        del published["quantization_config"]
    return dict(sorted(published.items()))


def _check_model_type(given: dict[str, Any], source: str) -> str:
    model_type = given.get("model_type", "deepseek_v3")
    if model_type not in _MODELS:
        reason = _OTHER_MODELS.get(model_type) if isinstance(model_type, str) else None
        raise UserError(
            f"{source}: model_type {shown(model_type)} isn't supported"
            + (f": {reason}" if reason else "")
            + "; give a DeepSeek-V2, V3, R1, V3.1, Moonlight or Kimi-K2 model"
        )
    return model_type


def _check_keys(given: dict[str, Any], names: set[str], source: str) -> None:
    known = _KNOWN | names
    for key, value in given.items():
        if key.startswith("index_") and value is not False:
            raise UserError(
                f"{source}: {key} {shown(value)} belongs to DeepSeek-V3.2's sparse attention, which isn't supported;"
                " give a DeepSeek-V3, R1 or V3.1 model"
            )
        if key in _FIXED and value != _FIXED[key][0]:
            right, reason = _FIXED[key]
            raise UserError(f"{source}: {key} {shown(value)} isn't supported ({reason}); it has to be {right!r}")
        if key not in known and value is not False and not key.startswith(("_", "unsloth")):
            guess = nearest(key, known)
            raise UserError(
                f"{source}: unknown key {key} = {shown(value)}; "
                + (f"did you mean {guess}? If not, " if guess else "")
                + "remove it from the file if it doesn't change the arithmetic"
            )


def _check_head_widths(given: dict[str, Any], source: str) -> None:
    heads = given.get("num_attention_heads")
    if heads is not None and given.get("num_key_value_heads", heads) != heads:
        raise UserError(
            f"{source}: num_key_value_heads {shown(given['num_key_value_heads'])} isn't num_attention_heads"
            f" {shown(heads)}; latent attention has no grouped heads: make them equal"
        )
    nope, rope, value = (given.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if not (isinstance(nope, int) and isinstance(rope, int)):
        return
    # Readers disagree which width head_dim means: the rotated part (transformers), the whole key, or the value.
    for key, widths in (("qk_head_dim", (nope + rope,)), ("head_dim", (rope, nope + rope, nope, value))):
        if given.get(key, widths[0]) not in widths:
            raise UserError(f"{source}: {key} {shown(given[key])} contradicts the other widths; remove it")


def _check_quantization(quantization: Any, source: str) -> None:
    if quantization is None:
        return
    where = f"{source}: quantization_config"
    if isinstance(quantization, dict) and quantization.get("quant_method") == PACKED:
        return
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UserError(
            f"{where}.quant_method {shown(method)} isn't read; block fp8 and fireflyer's own are: give the original"
            " weights"
        )
    block = quantization.get("weight_block_size")
    sizes = block if isinstance(block, (list, tuple)) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(f"{where}.weight_block_size {shown(block)} isn't two positive sizes such as [128, 128]")
    if quantization.get("fmt", "e4m3") != "e4m3":
        raise UserError(f"{where}.fmt {shown(quantization['fmt'])} isn't read; only e4m3 is")


def _rope(given: dict[str, Any], source: str) -> tuple[Any, dict[str, Any] | None]:
    """(rope_theta, YaRN's settings or None) from either spelling."""
    parts = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        if spelling in given:
            if not isinstance(given[spelling], dict):
                raise UserError(f"{source}: {spelling} {shown(given[spelling])} isn't a table; see a published file")
            parts[spelling] = {key: value for key, value in given[spelling].items() if value is not None}
    thetas = [part.pop("rope_theta") for part in parts.values() if "rope_theta" in part]
    thetas += [given["rope_theta"]] if "rope_theta" in given else []
    if any(theta != thetas[0] for theta in thetas):
        raise UserError(f"{source}: rope_theta is given twice, as {shown(thetas[0])} and {shown(thetas[-1])}; keep one")
    readings = [_yarn(part, f"{source}: {spelling}") for spelling, part in parts.items()]
    if any(reading != readings[0] for reading in readings):
        raise UserError(f"{source}: rope_scaling and rope_parameters contradict each other; keep one")
    return (thetas[0] if thetas else 10000.0), (readings[0] if readings else None)


def _yarn(part: dict[str, Any], where: str) -> dict[str, Any] | None:
    types = [part.pop(key) for key in ("rope_type", "type") if key in part]
    if any(name != types[0] for name in types):
        raise UserError(f"{where}: rope_type {shown(types[0])} and type {shown(types[1])} differ; keep one")
    kind = types[0] if types else ("default" if not part else None)
    if kind not in ("yarn", "default"):
        raise UserError(f"{where}: rope_type {shown(kind)} isn't supported; it has to be 'yarn' or 'default'")
    fixed = {"partial_rotary_factor": 1, "truncate": True}
    for key in [key for key in fixed if key in part]:
        if (value := part.pop(key)) != fixed[key]:
            raise UserError(f"{where}: {key} {shown(value)} isn't supported; remove it")
    if kind == "default":
        if part:
            key = next(iter(part))
            raise UserError(f"{where}: {key} {shown(part[key])} has no meaning with rope_type 'default'; remove it")
        return None
    return part
