"""Memory: loading takes the model and hardly more, exporting hardly anything; by the kernel's own high-water mark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = {
    "vocab_size": 8000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256,
    "num_nextn_predict_layers": 1,
}

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from fireflyer import ModelConfig, load_model
from fireflyer.checkpoint.hf import save_published
from fireflyer.checkpoint.names import published_places, scale_name
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.checkpoint.safetensors_file import write_safetensors

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

def growth(act):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high water to what is in use
    kept = act()
    return status("VmHWM") - before

folder = Path(sys.argv[1])
config = ModelConfig.from_dict(json.loads(sys.argv[2]))
places = list(published_places(config))

def make(path, config, tensors):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    write_safetensors(path / "model.safetensors", tensors)

class Ones:
    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype
    def __getitem__(self, rows):
        return torch.ones(1).expand(self.shape)[rows]

make(folder / "fp32", config, {place.name: Ones(place.shape, torch.float32) for place in places})
fp8 = {}
for place in places:
    if place.is_quantized:
        fp8[place.name] = Ones(place.shape, torch.float8_e4m3fn)
        fp8[scale_name(place.name)] = Ones((-(-place.shape[0] // 128), -(-place.shape[1] // 128)), torch.float32)
    else:
        fp8[place.name] = Ones(place.shape, torch.bfloat16)
quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
make(folder / "fp8", config.replace(quantization_config=quantization), fp8)

result = {"numbers": sum(p.numel() for p in load_model(folder / "fp8").state_dict().values())}
result["fp32"] = growth(lambda: load_model(folder / "fp32"))
result["fp32 to bf16"] = growth(lambda: load_model(folder / "fp32", torch.bfloat16))
result["fp8 to fp32"] = growth(lambda: load_model(folder / "fp8"))
def export():
    checkpoint = open_checkpoint(folder / "fp8")
    save_published(folder / "exported", checkpoint.config, checkpoint.tensors)
result["export"] = growth(export)
print(json.dumps(result))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own count of memory")
def test_loading_stays_within_the_model_and_one_tensor(tmp_path: Path) -> None:
    # glibc then gives large blocks back at once, so that one measure doesn't live in the remains of the one before.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(SETTINGS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    numbers, largest = result["numbers"], 8000 * 256
    # The measure works: what must be there is seen. A mapped file or a second copy would add half or as much again.
    slack = 12 << 20
    assert result["fp32"] > numbers * 3.8
    assert result["fp32"] < numbers * 4 + largest * 4 + slack
    assert result["fp32 to bf16"] < numbers * 2 + largest * 4 + slack
    assert result["fp8 to fp32"] < numbers * 4 + largest * 4 + slack
    assert result["export"] < largest * 4 + slack
