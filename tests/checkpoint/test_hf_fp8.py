"""Block FP8 checkpoints, made here as the released ones are laid out, load to the exact dequantised values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_models import edit_config, files_tensors, own_model, same_bytes
from safetensors.torch import load_file, save_file

from fireflyer import UserError, load_model, save_model
from fireflyer.checkpoint.hf import stream_published
from fireflyer.numerics.fp8 import quantize_block

BLOCK = (8, 5)  # neither side divides the widths of the tiny model


def naive_dequantize(weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    out = weight.float()
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] *= scale_inv[row // BLOCK[0], column // BLOCK[1]]
    return out


def save_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """An FP8 checkpoint whose scales all lie in another shard than their weights; returns the exact values."""
    save_model(own_model(), folder)
    weights, scales, values = {}, {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj" in name and "eh_proj" not in name:
            weights[name], scales[name + "_scale_inv"] = quantize_block(tensor, BLOCK)
            values[name] = naive_dequantize(weights[name], scales[name + "_scale_inv"])
        else:
            weights[name] = tensor if "correction_bias" in name else tensor.bfloat16()
            values[name] = weights[name].float()
    (folder / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": weights, "model-00002-of-00002.safetensors": scales}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    edit_config(folder, quantization_config={**quantization, "activation_scheme": "dynamic"})
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    values = save_fp8(tmp_path / "fp8")
    model = load_model(tmp_path / "fp8", dtype=dtype)
    for name, tensor in stream_published(model):
        assert same_bytes(tensor, values[name].to(tensor.dtype if "correction_bias" in name else dtype)), name
    assert model.config.quantization_config is None
    save_model(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any(name.endswith("_scale_inv") for name in files_tensors(tmp_path / "plain"))
    model.config = model.config.replace(quantization_config={"quant_method": "fp8", "weight_block_size": [8, 5]})
    save_model(model, tmp_path / "made-by-hand")
    assert "quantization_config" not in json.loads((tmp_path / "made-by-hand" / "config.json").read_text())


def test_reading_by_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = save_fp8(tmp_path)
    # 3 rows at a time of 32 columns: most chunks begin within a row of blocks.
    monkeypatch.setattr("fireflyer.checkpoint.safetensors_file.CHUNK_BYTES", 3 * 32 * 4)
    for name, tensor in stream_published(load_model(tmp_path)):
        assert same_bytes(tensor, values[name]), name


def test_weights_already_dequantised_beside_a_stale_config(tmp_path: Path) -> None:
    save_model(own_model(), tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert torch.equal(load_model(tmp_path).lm_head.weight, own_model().lm_head.weight)


NAME = "model.layers.1.mlp.experts.3.down_proj.weight"
SCALE = f"{NAME}_scale_inv"
Shard = dict[str, torch.Tensor]
DAMAGES: dict[str, tuple[Callable[[Shard, Shard], object], str]] = {
    "no scale": (
        lambda weights, scales: scales.pop(SCALE),
        f"'{NAME}' is FP8, but its scales, ..._scale_inv, are in no file",
    ),
    "no weight": (lambda weights, scales: weights.pop(NAME), f"'{SCALE}' has no place"),
    "scale of another shape": (
        lambda weights, scales: scales.update({SCALE: torch.ones(2, 2)}),
        rf"the scales of '{NAME}' are float32 \(2, 2\); its \(32, 16\) in blocks of 8 x 5 need float32 \(4, 4\)",
    ),
    "scale of another dtype": (
        lambda weights, scales: scales.update({SCALE: torch.ones(4, 4, dtype=torch.bfloat16)}),
        rf"the scales of '{NAME}' are bfloat16 \(4, 4\)",
    ),
    "a vector in FP8": (
        lambda weights, scales: weights.update({NAME: torch.zeros(3).to(torch.float8_e4m3fn)}),
        rf"'{NAME}' is FP8 of shape \(3,\), not a matrix",
    ),
    "another 8-bit format": (
        lambda weights, scales: (
            weights.update({NAME: torch.zeros(32, 16, dtype=torch.float8_e5m2)}),
            scales.pop(SCALE),
        ),
        rf"{NAME} is float8_e5m2 \(32, 16\), which isn't read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, tmp_path: Path) -> None:
    save_fp8(tmp_path)
    change, message = DAMAGES[damage]
    files = sorted(tmp_path.glob("*.safetensors"))
    weights, scales = (load_file(file) for file in files)
    change(weights, scales)
    save_file(weights, files[0])
    save_file(scales, files[1])
    weight_map = dict.fromkeys(weights, files[0].name) | dict.fromkeys(scales, files[1].name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_fp8_without_a_block_size_is_refused(tmp_path: Path) -> None:
    save_fp8(tmp_path)
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(UserError, match=r"config.json: no quantization_config, but .*_proj.* is FP8"):
        load_model(tmp_path)
