"""`inspect --fit` against what a process that answers really takes, and against counting by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fireflyer import ModelConfig, save_model
from fireflyer.checkpoint.packed import plan_packed
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.evaluate.fit import bounded, cache_bytes, count_weights, experts_read, fit, longest_context
from fireflyer.evaluate.machine import Machine
from fireflyer.model.decoder import Decoder
from fireflyer.numerics.native.library import library

CONTEXT = 700
SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 640,
    "intermediate_size": 1792,
    "moe_intermediate_size": 320,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 40,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 2048,
}
MACHINE = Machine(32 << 30, 16 << 30, 100 << 30, 300 << 20, 20e9, 1e9, None, None)

ANSWER = """
import sys
from pathlib import Path
from fireflyer import LLM, SamplingParams
llm = LLM(sys.argv[1])
llm.generate([[i % 16000 for i in range(int(sys.argv[2]) - 4)]], SamplingParams(max_tokens=4, ignore_eos=True))
# Not getrusage: its peak begins with that of the process that started this one.
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


def run(*command: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """155 million parameters: 620 MB in fp32."""
    folder = tmp_path_factory.mktemp("fit") / "model"
    model = Decoder(ModelConfig.from_dict(SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    save_model(model, folder)
    return folder


def test_within_15_percent_of_what_a_process_takes(folder: Path, tmp_path: Path) -> None:
    facts = json.loads(run("-m", "fireflyer", "inspect", str(folder), "--fit", "--context", str(CONTEXT), "--json"))
    checkpoint = open_checkpoint(folder)
    plan_packed(checkpoint.config, checkpoint.tensors, "int4").write(tmp_path)
    # Without the native kernels a packed product unpacks its matrix first.
    for precision, place in (("fp32", folder), *([("int4", tmp_path)] if library() else [])):
        estimate = facts["fit"]["precisions"][precision]
        peak = int(run("-c", ANSWER, str(place), str(CONTEXT)))
        assert 0.85 < estimate["total_bytes"] / peak < 1.15
        files = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        assert estimate["disk_bytes"] <= files < estimate["disk_bytes"] * 1.001 + 100_000


def test_weights_are_what_the_tensors_hold() -> None:
    config = ModelConfig.from_dict({**SHAPE, "num_nextn_predict_layers": 1})
    numbers = sum(tensor.numel() for tensor in Decoder(config).state_dict().values())
    weights = count_weights(config, "fp32")
    assert weights.total == 4 * numbers
    assert weights.expert == 4 * 3 * 640 * 320
    assert weights.experts == 6 * 40 * weights.expert  # five main layers and the MTP's
    per_step = 4 * sum(
        tensor.numel()
        for name, tensor in Decoder(config).state_dict().items()
        if not any(part in name for part in (".mtp.", "embed_tokens", ".mlp.experts."))
    )
    assert weights.read == per_step
    biases = 6 * 40
    assert count_weights(config, "bf16").total == 2 * numbers + 2 * biases
    copies = 2 * 16384 * 640
    assert count_weights(config, "bf16").disk == 2 * (numbers + copies) + 2 * biases
    assert count_weights(config, "int4").total < 0.2 * weights.total


def test_the_rate_and_the_experts_that_a_batch_reads() -> None:
    config = ModelConfig.from_dict(SHAPE)
    alone = fit(config, "fp32", 1000, 1, MACHINE)
    step = alone.weights.read + 5 * 6 * alone.weights.expert + 1000 * 288 * 6 * 4
    assert alone.decode_tokens_per_s == pytest.approx(20e9 / step)
    draws = [len({int(e) for _ in range(8) for e in torch.randperm(40)[:6]}) for _ in range(400)]
    assert experts_read(config, 8) == pytest.approx(5 * sum(draws) / 400, rel=0.02)
    assert cache_bytes(config, 1001, 3, torch.float32) == 3 * 1008 * 288 * 6 * 4


def test_what_bounded_experts_make_of_it() -> None:
    config = ModelConfig.from_dict(SHAPE)
    small = Machine(**{**vars(MACHINE), "memory_free": 500 << 20})
    fitted = fit(config, "fp32", 512, 1, small)
    assert not fitted.fits
    found = bounded(config, fitted, 1e9)
    assert found is not None
    assert found.limit + fitted.weights.total - fitted.weights.experts + fitted.cache < 500 << 20
    missed = (1 - found.share_resident) * 30 * fitted.weights.expert
    assert 1 / found.decode_tokens_per_s == pytest.approx(fitted.step_s + missed / 1e9)
    assert (
        bounded(config, fit(config, "fp32", 512, 1, Machine(**{**vars(small), "memory_free": 200 << 20})), 1e9) is None
    )


def test_the_longest_context_that_fits() -> None:
    config = ModelConfig.from_dict({**SHAPE, "max_position_embeddings": 1 << 20})
    machine = Machine(**{**vars(MACHINE), "memory_free": 3 << 30})
    fitted = fit(config, "int8", 1 << 20, 1, machine)
    longest = longest_context(config, fitted, machine)
    assert fit(config, "int8", longest, 1, machine).fits
    assert not fit(config, "int8", longest + 16, 1, machine).fits
    tiny = Machine(**{**vars(MACHINE), "memory_free": 100 << 20})
    assert longest_context(config, fit(config, "int8", 16, 1, tiny), tiny) == 0
