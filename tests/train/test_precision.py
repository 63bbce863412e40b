"""[precision]: an FP8 run stopped and gone on with, which layers it reaches, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_run import checkpoint_bytes, read_tensors, tiny_recipe, write_text

from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.errors import Stopped, UserError
from fireflyer.model.decoder import Decoder
from fireflyer.model.fp8_layers import Fp8Experts, Fp8Linear
from fireflyer.train.events import Event, Notice
from fireflyer.train.loop import train
from fireflyer.train.precision import EMULATED, check_precision, set_precision
from fireflyer.train.recipe import load_recipe, read_recipe
from fireflyer.train.settings import PrecisionSettings

FP8 = {"precision__matmul": "fp8", "precision__moments": "bf16"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl", 200)


def test_a_stopped_fp8_run_goes_on_to_the_bit(text: Path, tmp_path: Path):
    said: list[Event] = []
    recipe = tiny_recipe(text, steps=4, checkpoint_every=2, parallel__recompute=True, **FP8)
    train(recipe, tmp_path / "whole", on_event=said.append)
    assert Notice(EMULATED) in said
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "parts", should_stop=lambda: True)
    train(recipe, tmp_path / "parts")
    ends = [newest_good_checkpoint(tmp_path / name) for name in ("whole", "parts")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert checkpoint_bytes(ends[0]) == checkpoint_bytes(ends[1])
    stored = read_recipe(tmp_path / "whole" / "recipe.toml").precision
    assert (stored.matmul, stored.moments, stored.gradient_tile) == ("fp8", "bf16", "1x128")
    weights, kept = read_tensors(ends[0] / "model.safetensors"), read_tensors(ends[0] / "trainer.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    moments = {name: tensor.dtype for name, tensor in kept.items() if ".exp_avg" in name}
    assert moments
    assert set(moments.values()) == {torch.bfloat16}


def test_micro_batches_add_up(text: Path, tmp_path: Path):
    """Tiles don't reach across rows, but for the weights' gradients, whose tokens are others; the loss is the same."""
    losses = []
    for micro in (0, 2):
        recipe = tiny_recipe(text, steps=1, schedule__warmup_steps=0, parallel__micro_batch_size=micro, **FP8)
        losses.append(train(recipe, tmp_path / str(micro)).loss)
    assert math.isclose(losses[0], losses[1], rel_tol=1e-6)


def test_another_precision_is_another_run(text: Path, tmp_path: Path):
    train(tiny_recipe(text, steps=1, schedule__warmup_steps=0), tmp_path / "run")
    with pytest.raises(UserError, match=r"precision\.matmul: 'dtype' -> 'fp8'"):
        train(tiny_recipe(text, steps=2, schedule__warmup_steps=0, **FP8), tmp_path / "run")


def test_the_setting_reaches_every_layer():
    recipe = tiny_recipe("text.jsonl", **FP8, precision__gradient_tile="128x128")
    model = Decoder(recipe.model)
    assert set_precision(model, recipe.model_copy(update={"device": "cpu"})) == EMULATED
    layers = [module for module in model.modules() if isinstance(module, (Fp8Linear, Fp8Experts))]
    assert layers
    assert all(layer.gradient_tile == (128, 128) for layer in layers)
    assert set_precision(Decoder(recipe.model), tiny_recipe("text.jsonl")) is None


def test_a_device_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_recipe("text.jsonl", **FP8)
    with pytest.raises(UserError, match=r"mps has no FP8 products; --set precision\.matmul=dtype, or --set device=cpu"):
        check_precision(recipe.model_copy(update={"device": "mps"}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UserError, match=r'"fp8" on device = cuda:1: NVIDIA L40S has compute capability 8\.9'):
        check_precision(recipe.model_copy(update={"device": "cuda:1"}))
    check_precision(tiny_recipe("text.jsonl").model_copy(update={"device": "mps"}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer__name": "muon", "precision__moments": "bf16"}, 'moments = "bf16" is AdamW\'s'),
        ({"precision__gradient_tile": "128x128"}, 'needs precision.matmul = "fp8"'),
        ({"precision__matmul": "fp8", "compile": True}, "--set compile=false"),
        ({"precision__matmul": "fp8", "lora__rank": 4, "balance__bias_speed": 0}, r"not with \[lora\]; leave it out"),
        ({"precision__matmul": "fp4"}, r"precision\.matmul = .?fp4"),
        ({"precision__matmult": "fp8"}, "did you mean precision.matmul"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict, said: str):
    with pytest.raises(UserError, match=said):
        tiny_recipe("text.jsonl", **settings)


def test_v3_s_own_recipe_is_trained_so():
    precision = load_recipe("deepseek-v3").precision
    assert precision == PrecisionSettings(matmul="fp8", moments="bf16")
