"""Tiny models of every released kind, and a bridge to transformers, whose models are the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fireflyer.config import ModelConfig
from fireflyer.model.decoder import Decoder, init_weights_

_YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4, "beta_slow": 1}

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "num_nextn_predict_layers": 0,
}

_V2 = {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": False}
_V3 = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "norm_topk_prob": True, "topk_method": "noaux_tc"}

# What sets each released model apart, at a size for tests.
_KINDS: dict[str, dict[str, Any]] = {
    "v2": _V2
    | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
    | {"q_lora_rank": 24, "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "v2-lite": _V2
    | {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 2}
    | {"q_lora_rank": None, "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "v3": _V3
    | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    | {"q_lora_rank": 24, "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "moonlight": _V3
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446, "n_shared_experts": 2}
    | {"q_lora_rank": None, "rope_theta": 50000.0, "rms_norm_eps": 1e-5},
    "k2": _V3
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827, "model_type": "kimi_k2", "rope_theta": 50000.0}
    | {
        "q_lora_rank": 24,
        "rope_scaling": _YARN | {"factor": 32.0, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    }
    | {"max_position_embeddings": 1024},
}


def _published(kind: str, **changes: Any) -> dict[str, Any]:
    return _SHAPE | _KINDS[kind] | changes


def _tiny(kind: str = "v3", seed: int = 0, **changes: Any) -> Decoder:
    config = ModelConfig.from_dict(_published(kind, **changes))
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    init_weights_(model, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
            if "q_a_proj" in name or "kv_a_proj" in name:
                latent = config.q_lora_rank if "q_a_proj" in name else config.kv_lora_rank
                parameter[:latent].mul_(0.01)  # small latents: the eps of their norms shows
        for _, bias in model.gate_biases():
            bias.copy_(-3 * torch.rand(bias.shape, generator=generator))
    return model


def _transformers_config(model: Decoder) -> Any:
    from transformers import DeepseekV2Config, DeepseekV3Config

    published = model.config.to_dict()
    is_v2 = published.pop("model_type") == "deepseek_v2"
    config = (DeepseekV2Config if is_v2 else DeepseekV3Config)(**published)
    config._attn_implementation = "eager"
    return config


def _halves(name: str, value: Tensor) -> dict[str, Tensor]:
    """transformers keeps gate and up apart in dense and shared feed-forwards; the experts are stacked as ours."""
    if not name.endswith("gate_up_proj.weight"):
        return {name: value}
    gate, up = value.chunk(2)
    return {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}


def _their_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the main model under transformers' names."""
    return {k: v for name, value in named.items() if ".mtp." not in name for k, v in _halves(name, value).items()}


def _twin(model: Decoder) -> Any:
    from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

    theirs = DeepseekV2ForCausalLM if model.config.model_type == "deepseek_v2" else DeepseekV3ForCausalLM
    twin = theirs(_transformers_config(model)).eval()
    # transformers lists a tied head beside the embedding.
    twin.load_state_dict(_their_names(model.state_dict()) | {"lm_head.weight": model.head_weight}, strict=True)
    return twin


def _mtp_twin(model: Decoder, twin: Any) -> Any:
    from transformers.modeling_layers import MtpModel

    places = {r"\.block\.": ".mtp_block.", r"^(\d+)\.norm\.": r"\1.post_norm."}
    state = {}
    for name, value in model.model.mtp.state_dict().items():
        for ours, theirs in places.items():
            name = re.sub(ours, theirs, name)
        state |= {f"layers.{k}": v for k, v in _halves(name, value).items()}
    mtp = MtpModel(twin, len(model.model.mtp)).eval()
    missing, unexpected = mtp.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(not name.startswith("layers.") for name in missing), missing
    return mtp


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Decoder]:
    """`tiny(kind, seed, **published)`: a random small Decoder with uneven norms and strongly negative gate biases."""
    return _tiny


@pytest.fixture(scope="session")
def twin() -> Callable[[Decoder], Any]:
    """The same model in transformers."""
    return _twin


@pytest.fixture(scope="session")
def mtp_twin() -> Callable[[Decoder, Any], Any]:
    """The MTP modules in transformers, around the twin of the main model."""
    return _mtp_twin


@pytest.fixture(scope="session")
def their_names() -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return _their_names


@pytest.fixture(scope="session")
def ids() -> Callable[..., Tensor]:
    """`ids(batch, tokens, seed)`: random token ids of the tiny vocabulary."""

    def make(batch: int, tokens: int, seed: int = 1) -> Tensor:
        return torch.randint(0, _SHAPE["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))

    return make
