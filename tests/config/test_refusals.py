"""Whatever would change the arithmetic is refused in one line, by name, with the value and the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from fireflyer.config import ModelConfig
from fireflyer.errors import UserError

RELEASED_V3: dict[str, Any] = json.loads((Path(__file__).parent / "released_v3.json").read_text())
YARN = RELEASED_V3["rope_scaling"]


def v3(**changes: Any) -> dict[str, Any]:
    return {**RELEASED_V3, **changes}


def v2(**changes: Any) -> dict[str, Any]:
    scoring = {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
    return {**RELEASED_V3, **scoring, "model_type": "deepseek_v2", **changes}


def refusal(published: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        ModelConfig.from_dict(published, source="folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json: ")
    assert "\n" not in message
    return message


OTHER_MODELS = {
    "deepseek_v32": "sparse attention",
    "deepseek_v4": "V4",
    "qwen2": "Qwen",
    "qwen3": "Qwen",
    "llama": "Llama",
    "deepseek": "no latent attention",
    "gpt2": "gpt2",
}


@pytest.mark.parametrize(("model_type", "reason"), OTHER_MODELS.items())
def test_another_model_is_refused_by_name(model_type: str, reason: str):
    message = refusal(v3(model_type=model_type))
    assert repr(model_type) in message
    assert reason in message


REFUSED: list[tuple[dict[str, Any], str]] = [
    (v3(index_topk=2048), "index_topk 2048"),
    (v3(hidden_act="gelu"), "hidden_act 'gelu'"),
    (v3(attention_bias=True), "attention_bias True"),
    (v3(mlp_bias=True), "mlp_bias True"),
    (v3(attention_dropout=0.1), "attention_dropout 0.1"),
    (v3(moe_layer_freq=2), "moe_layer_freq 2"),
    (v3(rope_interleave=False), "rope_interleave False"),
    (v3(use_mla=False), "use_mla False"),
    (v3(num_key_value_heads=8), "num_key_value_heads 8"),
    (v3(head_dim=100), "head_dim 100"),
    (v3(qk_head_dim=128), "qk_head_dim 128"),
    (v3(rope_scaling={**YARN, "type": "linear"}), "rope_type 'linear'"),
    (v3(rope_scaling={**YARN, "rope_type": "default"}), "rope_type 'default' and type 'yarn'"),
    (v3(rope_scaling={"factor": 4}), "rope_type None"),
    (v3(rope_scaling={"type": "default", "factor": 4}), "factor 4"),
    (v3(rope_scaling={"type": "yarn", "factor": 4}), "original_max_position_embeddings is missing"),
    (v3(rope_scaling={**YARN, "factr": 1}), "did you mean factor?"),
    (v3(rope_scaling={**YARN, "factor": "40"}), "factor = '40'"),
    (v3(rope_scaling={**YARN, "factor": 0.5}), "factor = 0.5"),
    (v3(rope_scaling={**YARN, "beta_fast": 0.5}), "beta_fast 0.5"),
    (v3(rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0}), "mscale 0.7 without mscale_all_dim"),
    (v3(rope_scaling={**YARN, "truncate": False}), "truncate False"),
    (v3(rope_scaling={**YARN, "attention_factor": 1.2}), "attention_factor"),
    (v3(rope_scaling=40), "rope_scaling 40"),
    (v3(rope_parameters={"rope_type": "default"}), "contradict"),
    (v3(rope_parameters={**YARN, "rope_theta": 5e4}), "rope_theta is given twice"),
    (v3(topk_method="greedy"), "topk_method 'greedy'"),
    (v3(scoring_func="tanh"), "scoring_func 'tanh'"),
    (v3(scoring_func="softmax"), "scoring_func softmax doesn't go with model_type deepseek_v3"),
    (v2(topk_method="noaux_tc"), "topk_method 'noaux_tc'"),
    (v2(scoring_func="sigmoid"), "scoring_func sigmoid doesn't go with model_type deepseek_v2"),
    (v2(norm_topk_prob=True), "norm_topk_prob true"),
    (v3(qk_rope_head_dim=63), "qk_rope_head_dim 63 is odd"),
    (v3(num_experts_per_tok=257), "num_experts_per_tok 257"),
    (v3(num_experts_per_tok=0), "num_experts_per_tok 0"),
    (v3(num_experts_per_tok=33, topk_group=1), "num_experts_per_tok 33 is above the 32 experts"),
    (v2(num_experts_per_tok=33, topk_group=1), "num_experts_per_tok 33 is above the 32 experts"),
    (v3(n_group=7), "n_group 7 doesn't divide"),
    (v3(topk_group=9), "topk_group 9 is above n_group 8"),
    (v3(n_group=256), "n_group 256"),
    (v3(first_k_dense_replace=62), "first_k_dense_replace 62"),
    (v3(first_k_dense_replace=-1), "first_k_dense_replace = -1"),
    (v3(hidden_size=0), "hidden_size = 0"),
    (v3(vocab_size="129280"), "vocab_size = '129280'"),
    (v3(num_hidden_layers=61.0), "num_hidden_layers = 61.0"),
    (v3(num_attention_heads=True, num_key_value_heads=True), "num_attention_heads = True"),
    (v3(norm_topk_prob=1), "norm_topk_prob = 1"),
    (v3(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    (v3(rope_theta=float("inf")), "rope_theta = inf"),
    (v3(eos_token_id="1"), "eos_token_id"),
    (v3(quantization_config={"quant_method": "gptq"}), "'gptq'"),
    (v3(quantization_config="fp8"), "'fp8'"),
    (v3(quantization_config={"quant_method": "fp8"}), "weight_block_size None"),
    (v3(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 0]}), "weight_block_size [128, 0]"),
    (
        v3(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}),
        "quantization_config.fmt 'e5m2'",
    ),
    (v3(sliding_window=4096), "unknown key sliding_window = 4096"),
    (v3(hiden_size=7168), "did you mean hidden_size?"),
    (v3(extra={"a": 1}), "unknown key extra"),
    (v3(kv_lora_rank=None), "kv_lora_rank is missing"),
    (v3(sliding_window="line one\nline two"), "sliding_window"),
]


@pytest.mark.parametrize(("published", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_would_change_the_arithmetic_is_refused_by_name(published: dict[str, Any], named: str):
    assert named in refusal(published)


def test_every_required_key_is_named_when_missing():
    absent_is_fine = {"num_key_value_heads", "num_nextn_predict_layers", "n_group", "topk_group", "topk_method"}
    absent_is_fine |= {"architectures", "auto_map", "torch_dtype", "transformers_version", "use_cache", "ep_size"}
    absent_is_fine |= {"attention_bias", "attention_dropout", "hidden_act", "moe_layer_freq", "model_type"}
    absent_is_fine |= {"scoring_func", "norm_topk_prob", "rope_scaling", "rope_theta", "rms_norm_eps"}
    absent_is_fine |= {"tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id"}
    absent_is_fine |= {"quantization_config"}
    for key in RELEASED_V3.keys() - absent_is_fine:
        assert f"the key {key} is missing" in refusal({k: v for k, v in RELEASED_V3.items() if k != key})
