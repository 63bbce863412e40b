"""Adapters: what they add, that nothing else moves, merged against unmerged, PEFT's files, stop and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_runs import base_model, chat, post_training, write_lines
from safetensors.torch import save_file
from tiny_run import checkpoint_bytes, read_tensors

from fireflyer.checkpoint.adapter import adapted, open_adapter
from fireflyer.checkpoint.hf import load_model, load_opened
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.cli.main import main
from fireflyer.errors import Stopped, UserError
from fireflyer.infer.llm import LLM
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import Decoder
from fireflyer.train.loop import train
from fireflyer.train.lora import adapter_pairs, attach_adapters, fill_adapters
from fireflyer.train.post_training_settings import LoraSettings
from fireflyer.train.sft import open_chats

CHATS = [chat("add " * (i % 5 + 1), "it is so " * (i % 3 + 1)) for i in range(20)]
LORA = {"lora__rank": 3, "lora__alpha": 6.0, "schedule__lr": 1e-2, "eval_every": 3, "data__held_out": 0.2}
IDS = torch.arange(3, 63).view(2, 30)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", CHATS)


@pytest.fixture(scope="module")
def run_dir(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    train(post_training("sft", base, data, steps=12, **LORA), folder, opener=open_chats)
    return folder


def with_adapters(base: Path, **settings) -> Decoder:
    model = load_model(base)
    attach_adapters(model, LoraSettings(rank=3, alpha=6.0, **settings), seed=1)
    return model


def trained(run_dir: Path, base: Path) -> Decoder:
    model = with_adapters(base)
    fill_adapters(model, open_adapter(run_dir))
    return model


def test_it_begins_as_the_checkpoint_and_trains_adapters_alone(base: Path) -> None:
    model = with_adapters(base)
    plain = load_model(base)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-6, atol=1e-6)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert any("experts.gate_up_proj_lora_A" in name for name in names)
    few = [
        name for name, p in with_adapters(base, experts=False, targets=["o_proj"]).named_parameters() if p.requires_grad
    ]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in few} == {"o_proj"}


def test_a_step_by_hand(base: Path) -> None:
    """W + 2 B A for one projection and one expert, written out."""
    model = with_adapters(base)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    layer = model.model.layers[1].self_attn.o_proj
    x_o = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(2))
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
        by_hand = x_o @ (layer.weight + 2 * layer.lora_B @ layer.lora_A).T
        torch.testing.assert_close(layer(x_o), by_hand, rtol=1e-4, atol=1e-5)
        up = experts.gate_up_proj[4] + 2 * experts.gate_up_proj_lora_B[4] @ experts.gate_up_proj_lora_A[4]
        down = experts.down_proj[4] + 2 * experts.down_proj_lora_B[4] @ experts.down_proj_lora_A[4]
        gate, value = (x @ up.T).chunk(2, -1)
        one = torch.full((5, 1), 4)
        found = experts(x, one, torch.full((5, 1), 0.5))
        torch.testing.assert_close(found, 0.5 * ((gate.sigmoid() * gate * value) @ down.T), rtol=1e-3, atol=1e-3)


def test_the_loss_falls_and_the_base_is_not_in_the_run(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert rows[-1]["eval_loss"] < rows[2]["eval_loss"]
    folder = newest_good_checkpoint(run_dir)
    assert folder is not None
    assert not (folder / "model.safetensors").exists()
    moments = read_tensors(folder / "trainer.safetensors")
    assert all("lora_" in name for name in moments if name.startswith("optimizer."))


def test_merged_equals_unmerged(run_dir: Path, base: Path, tmp_path: Path) -> None:
    unmerged = trained(run_dir, base)(IDS).logits.detach()
    merged = load_opened(adapted(open_checkpoint(base), open_adapter(run_dir)), torch.float32, "cpu")
    assert float((unmerged - load_model(base)(IDS).logits).detach().abs().max()) > 0.1
    torch.testing.assert_close(merged(IDS).logits.detach(), unmerged, rtol=1e-4, atol=1e-4)
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--merge-adapter"]) == 0
    exported = load_model(tmp_path / "out")
    for name, tensor in merged.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    params = SamplingParams(max_tokens=8, temperature=0)
    asked = [{"role": "user", "content": "add"}]
    texts = [
        llm.chat(asked, params)[0].outputs[0].token_ids for llm in (LLM(base, adapter=run_dir), LLM(tmp_path / "out"))
    ]
    assert texts[0] == texts[1]


def test_the_files_are_pefts(run_dir: Path, base: Path) -> None:
    folder = newest_good_checkpoint(run_dir)
    assert folder is not None
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6.0)
    tensors = read_tensors(folder / "adapter_model.safetensors")
    places = {name.removesuffix(".weight") for name in open_checkpoint(base).tensors}
    for name in tensors:
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").removesuffix(".lora_B.weight")
        assert stem in places
        assert stem.rpartition(".")[2] in config["target_modules"]
    expert = "base_model.model.model.layers.1.mlp.experts.2"
    assert torch.equal(tensors[f"{expert}.gate_proj.lora_A.weight"], tensors[f"{expert}.up_proj.lora_A.weight"])
    pairs = adapter_pairs(load_model(base).config, trained(run_dir, base).state_dict())
    assert pairs.keys() == open_adapter(folder).pairs.keys()


def test_stopped_anywhere_it_ends_in_the_same_bits(run_dir: Path, base: Path, data: Path, tmp_path: Path) -> None:
    whole = newest_good_checkpoint(run_dir)
    assert whole is not None
    for k in (1, 7):
        asked = iter(range(1, 99))
        recipe = post_training("sft", base, data, steps=12, **LORA)
        with pytest.raises(Stopped):
            train(recipe, tmp_path / f"{k}", opener=open_chats, should_stop=lambda: next(asked) == k)  # noqa: B023
        train(recipe, tmp_path / f"{k}", opener=open_chats)
        found = newest_good_checkpoint(tmp_path / f"{k}")
        assert found is not None
        assert checkpoint_bytes(found) == checkpoint_bytes(whole)


def test_a_base_that_changed_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    """The run holds adapters alone: beside other weights they would be another model."""
    own = tmp_path / "base"
    shutil.copytree(newest_good_checkpoint(base), own)
    train(post_training("sft", own, data, **LORA, steps=2), tmp_path / "run", opener=open_chats)
    weights = read_tensors(own / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    save_file(weights | {name: weights[name] + 1e-3}, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"it changed since .* was saved"):
        train(post_training("sft", own, data, **LORA, steps=4), tmp_path / "run", opener=open_chats)
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    assert train(post_training("sft", own, data, **LORA, steps=4), tmp_path / "run", opener=open_chats).step == 4


def test_refusals(run_dir: Path, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for settings, words in [
        ({"lora__targets": ["head"]}, "lora.targets has 'head'"),
        ({"lora__targets": ["up_proj"]}, "gate_proj and up_proj together"),
        ({"lora__rank": 2, "balance__bias_speed": 0.1}, "which adapters leave as they are"),
        ({"lora__rank": 2, "ema__decay": 0.5}, "isn't kept for adapters"),
    ]:
        with pytest.raises(UserError, match=words):
            post_training("sft", base, data, **settings)
    with pytest.raises(UserError, match="an adapter, which goes with the model"):
        LLM(run_dir)
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        LLM(base, adapter=base)
    with pytest.raises(UserError, match="goes with weights in full"):
        LLM(base, adapter=run_dir, quantization="int8")
    assert main(["generate", str(base), "x", "--adapter", str(run_dir), "--max-tokens", "2"]) == 0
    assert main(["export", str(base), str(tmp_path / "out"), "--merge-adapter"]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err
