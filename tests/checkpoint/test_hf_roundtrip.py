"""Loading and saving against transformers 5.24: its files in, our files back, no bit changed and the logits equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from published_models import (
    FAMILIES,
    WIDTHS,
    edit_config,
    files_tensors,
    naive_listing,
    own_model,
    same_bytes,
    transformers_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from fireflyer import load_model, save_model
from fireflyer.checkpoint.hf import published_views, stream_published
from fireflyer.checkpoint.names import published_names


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_and_back(family: str, tmp_path: Path) -> None:
    original = transformers_model(family)
    original.save_pretrained(tmp_path / "theirs")
    if family == "k2":
        edit_config(tmp_path / "theirs", model_type="kimi_k2")
    model = load_model(tmp_path / "theirs")
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, original(tokens).logits, atol=1e-5, rtol=1e-5)

    save_model(model, tmp_path / "ours", max_shard_bytes=30_000)
    theirs, ours = files_tensors(tmp_path / "theirs"), files_tensors(tmp_path / "ours")
    assert ours.keys() == theirs.keys() == naive_listing({**WIDTHS, **FAMILIES[family], **_v2(family)}).keys()
    assert all(same_bytes(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = {"v2": "deepseek_v2", "v2-lite": "deepseek_v2", "k2": "kimi_k2"}.get(family, "deepseek_v3")
    assert (config["model_type"], config["torch_dtype"]) == (expected, "float32")

    if family == "k2":
        edit_config(tmp_path / "ours", model_type="deepseek_v3")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto").eval()
    state = again.state_dict()
    assert all(same_bytes(value, state[name]) for name, value in original.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, original(tokens).logits)


def _v2(family: str) -> dict[str, str]:
    return {} if family.startswith("v2") else {"topk_method": "noaux_tc"}


def test_own_model_comes_back_with_its_mtp_layers(tmp_path: Path) -> None:
    model = own_model(num_nextn_predict_layers=2)
    save_model(model, tmp_path / "a")
    again = load_model(tmp_path / "a")
    assert again.config == model.config
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(same_bytes(value, state[name]) for name, value in model.state_dict().items())
    tensors = files_tensors(tmp_path / "a")
    for layer in (3, 4):
        assert torch.equal(tensors[f"model.layers.{layer}.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
        assert torch.equal(tensors[f"model.layers.{layer}.shared_head.head.weight"], tensors["lm_head.weight"])
    # Where each sits: expert 5 of depth 2, and its halves in order.
    stacked = model.state_dict()["model.mtp.1.block.mlp.experts.gate_up_proj"][5]
    assert torch.equal(tensors["model.layers.4.mlp.experts.5.gate_proj.weight"], stacked[:16])
    assert torch.equal(tensors["model.layers.4.mlp.experts.5.up_proj.weight"], stacked[16:])
    assert torch.equal(tensors["model.layers.4.shared_head.norm.weight"], model.state_dict()["model.mtp.1.norm.weight"])


def test_declared_mtp_without_any_tensor_loads_as_none(tmp_path: Path) -> None:
    transformers_model("v3").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 1
    model = load_model(tmp_path)
    assert model.config.num_nextn_predict_layers == 0
    assert len(model.model.mtp) == 0


def test_same_weights_same_bytes(tmp_path: Path) -> None:
    save_model(own_model(), tmp_path / "a", max_shard_bytes=20_000)
    save_model(load_model(tmp_path / "a"), tmp_path / "b", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_shards_and_index(tmp_path: Path) -> None:
    model = own_model()
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=20_000)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    sizes, held = 0, {}
    for shard in shards:
        tensors = load_file(tmp_path / "many" / shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000
        sizes += size
        held |= dict.fromkeys(tensors, shard)
    assert index == {"metadata": {"total_size": sizes}, "weight_map": held}
    assert list(index["weight_map"]) == sorted(held) == published_names(model.config)
    whole, parts = load_file(tmp_path / "one" / "model.safetensors"), files_tensors(tmp_path / "many")
    assert all(same_bytes(parts[name], whole[name]) for name in whole)


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path: Path) -> None:
    save_model(own_model(), tmp_path / "a", max_shard_bytes=1)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == len(published_names(own_model().config))
    assert torch.equal(load_model(tmp_path / "a").lm_head.weight, own_model().lm_head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_into_every_other(dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    transformers_model("v3").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {n: t if "correction_bias" in n else t.to(stored) for n, t in load_file(file).items()}
    save_file(tensors, file)
    views = dict(stream_published(load_model(tmp_path, dtype=dtype)))
    for name, tensor in tensors.items():
        expected = tensor if "correction_bias" in name else tensor.to(dtype)
        assert same_bytes(views[name], expected), name


def test_gate_bias_stays_fp32_through_bf16(tmp_path: Path) -> None:
    model = own_model()
    exact = [bias.clone() for _, bias in model.gate_biases()]
    assert not any(torch.equal(bias, bias.bfloat16().float()) for bias in exact)
    save_model(model.to(torch.bfloat16), tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    narrow = load_model(tmp_path / "a", dtype=torch.bfloat16)
    save_model(narrow.to(torch.float16).to(torch.bfloat16), tmp_path / "b")
    tensors = files_tensors(tmp_path / "b")
    biases = [tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] for layer in (1, 2, 3)]
    for bias, expected in zip(biases, exact, strict=True):
        assert same_bytes(bias, expected)
    assert {tensor.dtype for name, tensor in tensors.items() if "bias" not in name} == {torch.bfloat16}
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "b", dtype="auto")
    assert same_bytes(theirs.model.layers[1].mlp.gate.e_score_correction_bias, exact[0])
    assert theirs.dtype == torch.bfloat16


def test_tied_head_is_not_written_and_an_equal_one_is_taken(tmp_path: Path) -> None:
    model = own_model(tie_word_embeddings=True)
    save_model(model, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["model.embed_tokens.weight"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    again = load_model(tmp_path / "a")
    assert again.state_dict().keys() == model.state_dict().keys()
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_stray_rotary_frequencies_are_passed_over(tmp_path: Path) -> None:
    save_model(own_model(), tmp_path / "a")
    file = tmp_path / "a" / "model.safetensors"
    strays = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(3)}
    save_file(load_file(file) | strays, file)
    state = load_model(tmp_path / "a").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in own_model().state_dict().items())


def test_tokenizer_files_come_along(tmp_path: Path) -> None:
    save_model(own_model(), tmp_path / "a")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (tmp_path / "a" / name).write_text(name)
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    model_files = ["config.json", "model.safetensors"]
    tokenizer_files = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(model_files + tokenizer_files)
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokenizer.json"
    save_model(own_model(), tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == model_files
    save_model(own_model(), tmp_path / "d", tokenizer_from=tmp_path / "a")
    assert (tmp_path / "d" / "chat_template.jinja").exists()


def test_views_share_the_models_memory() -> None:
    model = own_model()
    views = dict(stream_published(model))
    storages = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert {view.untyped_storage().data_ptr() for view in views.values()} == storages
    snapshot = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _, view in published_views(model.config, snapshot):
        view.zero_()
    assert all(not tensor.any() for tensor in snapshot.values())
    assert views["lm_head.weight"].any()
