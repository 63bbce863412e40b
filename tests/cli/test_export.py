"""`fireflyer export`: from a published folder and from a run, with its options, the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_models import edit_config, files_tensors, own_model, same_bytes
from safetensors.torch import load_file, save_file

from fireflyer import load_model, save_model
from fireflyer.checkpoint.hf import stream_published, write_published
from fireflyer.checkpoint.run import write_checkpoint
from fireflyer.checkpoint.trainer_state import write_trainer_state
from fireflyer.cli.main import main
from fireflyer.model.decoder import Decoder
from fireflyer.numerics.fp8 import dequantize_block, quantize_block

EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def averaged(model: Decoder) -> dict[str, torch.Tensor]:
    """What a run keeps: an average of every parameter (gate biases and the MTP's copies have none of their own)."""
    own = {name: tensor for name, tensor in stream_published(model) if "correction_bias" not in name}
    copies = ("layers.3.embed_tokens.weight", "shared_head.head.weight")
    return {name: tensor * 0.5 + 1 for name, tensor in own.items() if not name.endswith(copies)}


def make_run(folder: Path, ema: dict[str, torch.Tensor]) -> Path:
    """A run folder with one checkpoint; returns it."""
    model = own_model()

    def write(checkpoint: Path) -> None:
        write_published(checkpoint, model.config, dict(stream_published(model)))
        (checkpoint / "tokenizer.json").write_text("{}")
        moments = {f"exp_avg.{name}": tensor for name, tensor in averaged(model).items()}
        write_trainer_state(checkpoint, moments | {f"ema.{name}": tensor for name, tensor in ema.items()}, {})

    return write_checkpoint(folder, 60, write)


def test_a_run_gives_its_checkpoints_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_run(tmp_path / "run", {})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    out = contents(tmp_path / "out")
    assert out == {name: data for name, data in contents(checkpoint).items() if name in out}
    assert sorted(out) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert f"{tmp_path / 'out'}: weights of {checkpoint}, 135 tensors" in capsys.readouterr().out
    assert main(["export", str(checkpoint), str(tmp_path / "again")]) == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "third")]) == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "third") == out


def test_ema(tmp_path: Path) -> None:
    model = own_model()
    ema = averaged(model)
    make_run(tmp_path / "run", ema)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 0
    exported = files_tensors(tmp_path / "out")
    for name, tensor in stream_published(model):
        if "correction_bias" in name:
            expected = tensor
        elif name.endswith("layers.3.embed_tokens.weight"):
            expected = ema["model.embed_tokens.weight"]
        elif name.endswith("shared_head.head.weight"):
            expected = ema["lm_head.weight"]
        else:
            expected = ema[name]
        assert same_bytes(exported[name], expected), name
    load_model(tmp_path / "out")


def drop(ema: dict[str, torch.Tensor]) -> None:
    del ema[EXPERT]


def misshape(ema: dict[str, torch.Tensor]) -> None:
    ema[EXPERT] = torch.ones(3)


def mistype(ema: dict[str, torch.Tensor]) -> None:
    ema[EXPERT] = torch.ones(16, 32, dtype=torch.int64)


EMA_DAMAGES: list[tuple[Callable[[dict[str, torch.Tensor]], None], str]] = [
    (dict.clear, "it has no EMA weights; only runs with ema.decay above 0 keep them"),
    (drop, f"no averaged {EXPERT} is in it, though others are"),
    (misshape, f"ema.{EXPERT} has shape (3,), but config.json makes it (16, 32)"),
    (mistype, f"ema.{EXPERT} is int64 (16, 32), which isn't read"),
]


@pytest.mark.parametrize(("damage", "message"), EMA_DAMAGES)
def test_ema_that_is_not_there(
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ema = averaged(own_model())
    damage(ema)
    make_run(tmp_path / "run", ema)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--ema"]) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_ema_of_a_published_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(own_model(), tmp_path / "c")
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out"), "--ema"]) == 2
    assert "it has no EMA weights" in one_line(capsys)


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_dtype(word: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {"bf16": torch.float32, "fp32": torch.bfloat16}[word]
    save_model(own_model().to(stored), tmp_path / "c")
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out"), "--dtype", word]) == 0
    exported = files_tensors(tmp_path / "out")
    for name, tensor in files_tensors(tmp_path / "c").items():
        assert same_bytes(exported[name], tensor if "correction_bias" in name else tensor.to(dtype)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_fp8_becomes_bf16(tmp_path: Path) -> None:
    save_model(own_model(), tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    tensors = {name: t if "bias" in name else t.bfloat16() for name, t in load_file(file).items()}
    tensors[EXPERT], tensors[f"{EXPERT}_scale_inv"] = quantize_block(tensors[EXPERT], (16, 8))
    save_file(tensors, file)
    edit_config(tmp_path / "c", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 8]})
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out")]) == 0
    exported = files_tensors(tmp_path / "out")
    exact = dequantize_block(tensors[EXPERT], tensors[f"{EXPERT}_scale_inv"], (16, 8), torch.bfloat16)
    assert same_bytes(exported[EXPERT], exact)
    assert f"{EXPERT}_scale_inv" not in exported
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(own_model(), tmp_path / "c")
    assert main(["export", str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    assert "absent: no such folder" in one_line(capsys)
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "c")]) == 2
    assert "not empty, and nothing is overwritten" in one_line(capsys)
    assert main(["export", str(tmp_path / "c")]) == 2
    assert "DIR" in one_line(capsys)
    assert main(["export", str(tmp_path / "c"), str(tmp_path / "out"), "--dtype", "int8"]) == 2
    assert "'fp32', 'bf16'" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fireflyer: ")
    assert err.count("\n") == 1
    return err
