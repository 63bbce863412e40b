"""The published config.json in and out. Oracles: the released file, transformers 5.24's own configs and models."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.config import ModelConfig
from fireflyer.errors import UserError

# DeepSeek-R1's config.json as released, which is V3's.
RELEASED_V3: dict[str, Any] = json.loads((Path(__file__).parent / "released_v3.json").read_text())
YARN = RELEASED_V3["rope_scaling"]
TINY_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}
TINY_YARN = {**YARN, "factor": 4.0, "original_max_position_embeddings": 16}


def test_the_released_file_reads_to_its_values_and_back():
    config = ModelConfig.from_dict(RELEASED_V3)
    unread = {"architectures", "auto_map", "torch_dtype", "transformers_version"}
    written = config.to_dict()
    assert {key: written[key] for key in RELEASED_V3 if key not in unread} == {
        key: value for key, value in RELEASED_V3.items() if key not in unread
    }
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]
    assert not written.keys() & (unread - {"architectures"})
    assert (config.qk_head_dim, config.latent_dim, config.num_layers_with_mtp) == (192, 576, 62)
    assert [config.is_moe(index) for index in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def test_the_new_rope_spelling_equals_the_old_one():
    old = ModelConfig.from_dict(RELEASED_V3)
    without = {key: value for key, value in RELEASED_V3.items() if key not in ("rope_theta", "rope_scaling")}
    yarn = {key: value for key, value in YARN.items() if key != "type"}
    assert (
        ModelConfig.from_dict({**without, "rope_parameters": {"rope_theta": 10000, "rope_type": "yarn", **yarn}}) == old
    )
    both = {"rope_theta": 10000.0, "rope_type": "yarn", **YARN}
    assert ModelConfig.from_dict({**without, "rope_parameters": both, "rope_scaling": None}) == old
    plain = ModelConfig.from_dict({**without, "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}})
    assert (plain.rope_theta, plain.rope_scaling) == (5e4, None)
    assert plain == ModelConfig.from_dict({**without, "rope_theta": 5e4})


def test_absent_keys_take_the_family_s_values():
    """What transformers 5.24 leaves out of its exports."""
    families = {"deepseek_v2": ("softmax", "greedy", False), "deepseek_v3": ("sigmoid", "noaux_tc", True)}
    for model_type, expected in {**families, "kimi_k2": families["deepseek_v3"], None: families["deepseek_v3"]}.items():
        absent = ("scoring_func", "topk_method", "norm_topk_prob", "moe_layer_freq", "num_nextn_predict_layers")
        published = {key: value for key, value in RELEASED_V3.items() if key not in absent}
        config = ModelConfig.from_dict({**published, "model_type": model_type, "n_group": None, "topk_group": None})
        assert (config.scoring_func, config.topk_method, config.norm_topk_prob) == expected
        assert config.model_type == (model_type or "deepseek_v3")
        assert (config.n_group, config.topk_group, config.num_nextn_predict_layers) == (1, 1, 0)


def test_no_query_latent_is_spelt_null_or_zero():
    null, zero = (ModelConfig.from_dict({**RELEASED_V3, "q_lora_rank": rank}) for rank in (None, 0))
    assert null == zero
    assert null.q_lora_rank is None


@pytest.mark.parametrize("family", ["v2", "v2-lite", "v3", "moonlight"])
def test_transformers_reads_our_config_and_we_read_its_export(family: str, tmp_path: Path):
    """Both ways, and a model built from ours on the meta device has as many parameters as our arithmetic says."""
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

    from fireflyer.cost.parameters import count_parameters

    kind = DeepseekV2Config if family.startswith("v2") else DeepseekV3Config
    groups = {"n_group": 1, "topk_group": 1} if family in ("v2-lite", "moonlight") else {"n_group": 4, "topk_group": 2}
    method = {"topk_method": "group_limited_greedy"} if family == "v2" else {}
    rope = {"rope_type": "default", "rope_theta": 5e4} if family == "moonlight" else {**TINY_YARN, "rope_theta": 1e4}
    sizes = {**TINY_SIZES, "q_lora_rank": None} if family in ("v2-lite", "moonlight") else TINY_SIZES
    theirs = kind(**sizes, **groups, **method, rope_parameters=rope, n_shared_experts=2, routed_scaling_factor=2.446)
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_file(tmp_path)
    again = kind.from_dict(ours.to_dict())
    differing = {
        key for key, value in theirs.to_dict().items() if again.to_dict().get(key) != value and key != "architectures"
    }
    assert not differing
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(again)
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert numbers == count_parameters(ours).total


@st.composite
def _configs(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(2, 5))
    open_groups = draw(st.integers(1, groups))
    yarn = st.fixed_dictionaries(
        {"type": st.just("yarn"), "factor": st.floats(1, 64), "original_max_position_embeddings": st.integers(1, 4096)},
        optional={"mscale": st.just(1.0), "mscale_all_dim": st.floats(0, 2), "beta_fast": st.floats(2, 64)},
    )
    return {
        **TINY_SIZES,
        "model_type": draw(st.sampled_from(["deepseek_v3", "kimi_k2"])),
        "q_lora_rank": draw(st.none() | st.integers(1, 8)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": open_groups,
        "num_experts_per_tok": draw(st.integers(1, open_groups * per_group)),
        "routed_scaling_factor": draw(st.floats(0.1, 20)),
        "rope_scaling": draw(st.none() | yarn),
        "num_nextn_predict_layers": draw(st.integers(0, 3)),
        "eos_token_id": draw(st.none() | st.integers(0, 63) | st.lists(st.integers(0, 63))),
        "tie_word_embeddings": draw(st.booleans()),
        "aux_loss_alpha": 0.001,
    }


@given(published=_configs())
def test_writing_and_reading_gives_the_same_config(published: dict[str, Any]):
    config = ModelConfig.from_dict(published)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["aux_loss_alpha"] == 0.001


def test_harmless_keys_are_accepted():
    harmless = {
        "head_dim": 64,
        "qk_head_dim": 192,
        "id2label": {"0": "LABEL_0"},
        "unsloth_fixed": True,
        "_name_or_path": "deepseek-ai/DeepSeek-V3",
        "_commit_hash": "abc",
        "sliding_window": None,
        "use_sliding_window": False,
        "output_router_logits": False,
        "dtype": "bfloat16",
    }
    config = ModelConfig.from_dict({**RELEASED_V3, **harmless})
    assert config.extra["id2label"] == {"0": "LABEL_0"}
    assert config.replace(extra={}) == ModelConfig.from_dict(RELEASED_V3).replace(extra={})


def test_a_model_without_experts_needs_none_of_their_keys():
    sizes = {k: v for k, v in TINY_SIZES.items() if k not in ("moe_intermediate_size", "num_experts_per_tok")}
    config = ModelConfig.from_dict({**sizes, "n_routed_experts": None, "n_shared_experts": None})
    assert not any(config.is_moe(index) for index in range(4))


def test_replace_checks_again_and_keeps_the_rest():
    config = ModelConfig.from_dict(RELEASED_V3)
    smaller = config.replace(num_hidden_layers=4)
    assert smaller.num_hidden_layers == 4
    assert smaller.rope_scaling == config.rope_scaling
    with pytest.raises(UserError, match="qk_rope_head_dim 5 is odd"):
        config.replace(qk_rope_head_dim=5)
