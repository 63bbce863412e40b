"""The MTP layer's published names and order, with transformers' own MTP drafting as the oracle.

It reads layer 61 alone, so the tiny model has V3's 61 layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from published_models import own_model
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from fireflyer import save_model
from fireflyer.model.decoder import Decoder

TINY = {"num_hidden_layers": 61, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Path]:
    folder = tmp_path_factory.mktemp("mtp") / "model"
    model = own_model(**TINY, first_k_dense_replace=57, num_attention_heads=2, num_key_value_heads=2)
    save_model(model, folder, max_shard_bytes=300_000)
    return model, folder


def test_drafting_changes_no_token(exported: tuple[Decoder, Path]) -> None:
    _, folder = exported
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    prompt = torch.arange(5, 15)[None]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = theirs.generate(prompt, **settings)
    drafted = theirs.generate(prompt, use_mtp=True, **settings)
    assert plain.shape == (1, 22)
    assert torch.equal(plain, drafted)


def test_their_mtp_layer_holds_our_tensors(exported: tuple[Decoder, Path]) -> None:
    """Right names could still hold one another's values (enorm and hnorm, gate and up), so each tensor is compared."""
    model, folder = exported
    theirs = DeepseekV3ForCausalLM.from_pretrained(folder).eval()
    loaded = MtpModel.from_pretrained(theirs).layers[0].state_dict()
    ours = model.model.mtp[0].state_dict()
    renamed = {name.replace("block.", "mtp_block."): tensor for name, tensor in ours.items()}
    renamed["post_norm.weight"] = renamed.pop("norm.weight")
    shared = renamed.pop("mtp_block.mlp.shared_experts.gate_up_proj.weight")
    gate, up = shared.chunk(2)
    renamed["mtp_block.mlp.shared_experts.gate_proj.weight"] = gate
    renamed["mtp_block.mlp.shared_experts.up_proj.weight"] = up
    assert loaded.keys() == renamed.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in renamed.items())
