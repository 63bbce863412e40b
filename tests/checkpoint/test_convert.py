"""Conversions against naive arithmetic on tensors that no code of ours wrote: to the byte, in every direction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fp8_checkpoint import (
    PUBLISHED,
    is_fp8,
    naive_dequantize,
    naive_quantize,
    random_tensors,
    write_bf16,
    write_config,
    write_fp8,
    write_shards,
)
from gguf_files import write_gguf
from published_models import files_tensors, own_model, same_bytes
from safetensors.torch import load_file

from fireflyer import UserError, load_model, save_model
from fireflyer.checkpoint.convert import convert
from fireflyer.checkpoint.packed import load_packed, pack_checkpoint
from fireflyer.checkpoint.published import open_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("to", ["bf16", "fp32"])
def test_fp8_dequantised_to_the_byte(to: str, tmp_path: Path) -> None:
    values = write_fp8(tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "out", to)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == values.keys()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[to]
    for name, value in values.items():
        assert same_bytes(written[name], value if "correction_bias" in name else value.to(dtype)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    source = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del source["quantization_config"]
    assert config == source | {"torch_dtype": str(dtype).removeprefix("torch.")}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "fp8" / name).read_bytes()
    assert (tmp_path / "out" / "configuration_deepseek.py").is_file()


def test_the_logits_are_those_of_the_dequantised_weights(tmp_path: Path) -> None:
    values = write_fp8(tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "out", "fp32")
    write_shards(tmp_path / "plain", [values])
    write_config(tmp_path / "plain")
    tokens = torch.arange(24).view(2, 12) * 5 % 150
    got, expected = (load_model(tmp_path / name)(tokens) for name in ("out", "plain"))
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.mtp_logits[0], expected.mtp_logits[0])
    assert got.logits.std() > 0.01


@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantised_as_the_naive_loop_does(power_of_two: bool, tmp_path: Path) -> None:
    tensors = random_tensors()
    zeros = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[zeros][:128] = 0
    write_shards(tmp_path / "bf16", [tensors])
    extra = {"quantization_config": PUBLISHED | {"scale_fmt": "ue8m0"}} if power_of_two else {}
    write_config(tmp_path / "bf16", **extra)
    convert(tmp_path / "bf16", tmp_path / "fp8", "fp8")
    written = files_tensors(tmp_path / "fp8")
    names = {f"{name}_scale_inv" for name in tensors if is_fp8(name)}
    assert written.keys() == tensors.keys() | names
    for name, tensor in tensors.items():
        if is_fp8(name):
            quantized, scales = naive_quantize(tensor, power_of_two)
            assert same_bytes(written[name], quantized), name
            assert same_bytes(written[f"{name}_scale_inv"], scales), name
        else:
            assert same_bytes(written[name], tensor), name
    assert written["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 2)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"] == PUBLISHED | ({"scale_fmt": "ue8m0"} if power_of_two else {})
    convert(tmp_path / "fp8", tmp_path / "back", "bf16")
    for name, tensor in files_tensors(tmp_path / "back").items():
        expected = tensors[name]
        if is_fp8(name):
            expected = naive_dequantize(*naive_quantize(expected, power_of_two)).bfloat16()
        assert same_bytes(tensor, expected), name


def test_fp8_to_fp8_keeps_weights_and_scales(tmp_path: Path) -> None:
    write_fp8(tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "again", "fp8")
    before, after = files_tensors(tmp_path / "fp8"), files_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(same_bytes(after[name], tensor) for name, tensor in before.items())


def test_rows_at_a_time_and_small_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fp8(tmp_path / "fp8")
    write_bf16(tmp_path / "plain")
    for to in ("bf16", "int4"):
        convert(tmp_path / "fp8", tmp_path / to, to)  # type: ignore[arg-type]
    convert(tmp_path / "plain", tmp_path / "to-fp8", "fp8")
    monkeypatch.setattr("fireflyer.checkpoint.safetensors_file.CHUNK_BYTES", 1)
    for to in ("bf16", "int4"):
        convert(tmp_path / "fp8", tmp_path / f"{to}-small", to, max_shard_bytes=60_000)  # type: ignore[arg-type]
    convert(tmp_path / "plain", tmp_path / "to-fp8-small", "fp8", max_shard_bytes=60_000)
    for name in ("bf16", "to-fp8", "int4"):
        whole, small = files_tensors(tmp_path / name), files_tensors(tmp_path / f"{name}-small")
        assert whole.keys() == small.keys()
        assert all(same_bytes(small[tensor], value) for tensor, value in whole.items())
    index = json.loads((tmp_path / "bf16-small" / "model.safetensors.index.json").read_text())
    small = files_tensors(tmp_path / "bf16-small")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in small.values())
    assert len(set(index["weight_map"].values())) > 10
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "bf16-small" / file)


def test_bf16_to_bf16_is_an_export(tmp_path: Path) -> None:
    save_model(own_model().bfloat16(), tmp_path / "c", max_shard_bytes=40_000)
    convert(tmp_path / "c", tmp_path / "out", "bf16", max_shard_bytes=40_000)
    out = contents(tmp_path / "out")
    assert json.loads(out.pop("conversion.json"))["finished"]
    assert out == contents(tmp_path / "c")


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_packed(to: str, tmp_path: Path) -> None:
    write_fp8(tmp_path / "fp8")
    convert(tmp_path / "fp8", tmp_path / "out", to)  # type: ignore[arg-type]
    on_the_way_in = pack_checkpoint(open_checkpoint(tmp_path / "fp8"), to).state_dict()  # type: ignore[arg-type]
    mapped = load_packed(tmp_path / "out").state_dict()
    assert mapped.keys() == on_the_way_in.keys()
    assert all(same_bytes(mapped[name], tensor) for name, tensor in on_the_way_in.items())
    with pytest.raises(UserError, match="packed as integers"):
        convert(tmp_path / "out", tmp_path / "back", "bf16")


def test_files_without_the_mtp_layer_that_the_config_declares(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in random_tensors().items() if ".layers.2." not in name}
    write_shards(tmp_path / "c", [tensors])
    write_config(tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "out", "bf16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert files_tensors(tmp_path / "out").keys() == tensors.keys()


def test_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, own_model())
    convert(path, tmp_path / "out", "bf16")
    expected = load_model(path, dtype=torch.bfloat16).state_dict()
    got = load_model(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(same_bytes(got[name], tensor) for name, tensor in expected.items())


def test_kimis_rotary_frequencies_are_passed_over_and_others_refused(tmp_path: Path) -> None:
    tensors = write_bf16(tmp_path / "c")
    stray = "model.layers.1.self_attn.rotary_emb.inv_freq"
    write_shards(tmp_path / "kimi", [tensors | {stray: torch.ones(56)}])
    write_config(tmp_path / "kimi", model_type="kimi_k2")
    convert(tmp_path / "kimi", tmp_path / "out", "bf16")
    assert files_tensors(tmp_path / "out").keys() == tensors.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "kimi_k2"
    write_shards(tmp_path / "odd", [tensors | {f"{stray}s": torch.ones(56)}])
    write_config(tmp_path / "odd")
    with pytest.raises(UserError, match="inv_freqs' has no place"):
        convert(tmp_path / "odd", tmp_path / "no", "bf16")
    assert not (tmp_path / "no").exists()
