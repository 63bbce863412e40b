"""Tiny random models of both published kinds, with YaRN, and a tokenizer trained on a few lines."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fireflyer.config import ModelConfig
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.text.tokenizer import Tokenizer

VOCAB_SIZE = 300

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 160,
    # Eight times the published spread: the logits of a random model then differ by far more than rounding.
    "initializer_range": 0.16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 10.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}

V3 = _COMMON | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 24,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

V2 = _COMMON | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "topk_method": "group_limited_greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
}


def _make(published: dict, seed: int = 0) -> Decoder:
    model = Decoder(ModelConfig.from_dict(published))
    generator = torch.Generator().manual_seed(seed)
    init_weights_(model, generator)
    for _, bias in model.gate_biases():
        bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2 - 0.5)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Decoder]:
    """make_model("V3" or "V2", seed=0, **changed published keys)"""

    def make(kind: str, seed: int = 0, **changes: object) -> Decoder:
        return _make({"V3": V3, "V2": V2}[kind] | changes, seed)

    return make


@pytest.fixture(scope="session")
def model() -> Decoder:
    """One V3 for all tests that leave it as it is."""
    return _make(V3)


def follow(tokens: torch.Tensor, successor: torch.Tensor) -> torch.Tensor:
    """The one likely next token of each: tokens are 10 to 69."""
    return successor[tokens - 10]


@pytest.fixture(scope="session")
def successor() -> torch.Tensor:
    """What mostly follows each token in the text that `trained` has read."""
    return torch.randperm(60, generator=torch.Generator().manual_seed(0)) + 10


@pytest.fixture(scope="session")
def trained(successor: torch.Tensor) -> Decoder:
    """A model with two MTP layers that has learnt what mostly follows; in 15 of 100 places the text jumps."""
    model = _make(V3 | {"num_nextn_predict_layers": 2, "num_hidden_layers": 2, "initializer_range": 0.06})
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    steps = 100
    for step in range(steps):
        columns = [torch.randint(10, 70, (24,), generator=generator)]
        for _ in range(23):
            jump = torch.rand(24, generator=generator) < 0.15
            other = torch.randint(10, 70, (24,), generator=generator)
            columns.append(torch.where(jump, other, follow(columns[-1], successor)))
        ids_BT = torch.stack(columns, dim=1)
        out = model(ids_BT)
        loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        for depth, logits in enumerate(out.mtp_logits, start=1):
            loss = loss + 0.3 * F.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, depth + 1 :].flatten())
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    lines = ["the quick brown fox jumps over the lazy dog, the end.", "über 漢字 and 🎉🎊"] * 8
    return Tokenizer.train(lines, vocab_size=VOCAB_SIZE)
