"""Conversions of a checkpoint many times larger than the memory they take, beside `cp` of the same files.

The checkpoint has the form of the released FP8 files and 6.4 billion random weights. Each conversion is the command in
a process of its own; then `cp` copies what it wrote, and both end when the disk has it. Once on a disk, and once, a
smaller checkpoint, in memory, where neither waits for a disk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._result import Proof, Table
from fireflyer.checkpoint.hf import plan_shards
from fireflyer.checkpoint.names import published_places, scale_name
from fireflyer.checkpoint.safetensors_file import as_bytes, lay_out
from fireflyer.config import ModelConfig
from fireflyer.config.model_config import load_config
from fireflyer.config.sizes import show_bytes
from fireflyer.numerics.fp8 import scale_shape

SHARD_BYTES = 1_000_000_000
ALLOWED_BYTES = 2 << 30
"""What a conversion may take beside three times the largest tensor."""
FLOOR = 0.7
"""Of the speed at which cp writes to the same disk."""

_COMMAND = """
import sys
from pathlib import Path
from fireflyer.cli.main import main
code = main(["convert", *sys.argv[1:]])
# Not getrusage: its peak begins with that of the process that started this one.
print("peak", int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024)
sys.exit(code)
"""


def main() -> Proof:
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fireflyer-convert-") as place:
        source = Path(place) / "fp8"
        largest = _write_checkpoint(source, num_layers=11)
        for to in ("bf16", "fp8", "int8"):
            results.append({"where": "disk", "largest_tensor_bytes": largest, **_measure(source, Path(place), to)})
        stops = _stopped(source, Path(place))
    if (memory := Path("/dev/shm")).is_dir():
        with tempfile.TemporaryDirectory(prefix="fireflyer-convert-", dir=memory) as place:
            source = Path(place) / "fp8"
            largest = _write_checkpoint(source, num_layers=1)
            for to in ("bf16", "fp8", "int8", "int4"):
                results.append(
                    {"where": "memory", "largest_tensor_bytes": largest, **_measure(source, Path(place), to)}
                )
    columns = ["where", "to", "read", "written", "convert", "cp of the result", "peak memory"]
    rows = [
        [
            r["where"],
            r["to"],
            show_bytes(r["read_bytes"]),
            show_bytes(r["written_bytes"]),
            f"{r['written_gb_per_s']:.2f} GB/s",
            f"{r['cp_gb_per_s']:.2f} GB/s",
            show_bytes(r["peak_bytes"]),
        ]
        for r in results
    ]
    return Proof(
        {"conversions": results, "stopped": stops}, {"speed": Table(columns, rows)}, {}, _missed(results, stops)
    )


def _missed(results: list[dict[str, Any]], stops: dict[str, Any]) -> list[str]:
    missed = []
    for r in results:
        label, bound = f"{r['to']} in {r['where']}", ALLOWED_BYTES + 3 * r["largest_tensor_bytes"]
        if r["peak_bytes"] >= bound:
            missed.append(f"{label}: peak under {show_bytes(bound)}: took {show_bytes(r['peak_bytes'])}")
        if r["where"] == "disk" and r["written_gb_per_s"] < FLOOR * r["cp_gb_per_s"]:
            missed.append(f"{label}: {FLOOR:.0%} of cp's speed: {r['written_gb_per_s'] / r['cp_gb_per_s']:.0%}")
    if not stops["equal"]:
        missed.append("stopped and killed, the result has other bytes")
    return missed


def _measure(source: Path, place: Path, to: str) -> dict[str, Any]:
    """Speed, peak memory, and cp beside it. What was written is removed."""
    folder, copy = place / f"to-{to}", place / "copy"
    os.sync()
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, str(source), str(folder), "--to", to, "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    os.sync()
    took_s = time.perf_counter() - begun
    if done.returncode != 0:
        raise RuntimeError(f"conversion to {to} ended with {done.returncode}")
    report, peak = done.stdout.splitlines()
    written = json.loads(report)["bytes"]
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    os.sync()
    cp_s = time.perf_counter() - begun
    shutil.rmtree(copy)
    shutil.rmtree(folder)
    return {
        "to": to,
        "read_bytes": sum(path.stat().st_size for path in source.glob("*.safetensors")),
        "written_bytes": written,
        "seconds": took_s,
        "written_gb_per_s": written / took_s / 1e9,
        "cp_gb_per_s": written / cp_s / 1e9,
        "peak_bytes": int(peak.split()[1]),
    }


def _stopped(source: Path, place: Path) -> dict[str, Any]:
    """Kill a conversion and ask another to stop, then let it end; and one that runs through, to compare."""
    whole, often = place / "whole", place / "often"
    arguments = [str(source), str(often), "--to", "fp8"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, "-c", _COMMAND, *arguments], stdout=subprocess.DEVNULL)
        time.sleep(6)
        process.send_signal(number)
        process.wait()
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", _COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL)
    rest_s = time.perf_counter() - begun
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _COMMAND, str(source), str(whole), "--to", "fp8"], check=True, stdout=subprocess.DEVNULL
    )
    whole_s = time.perf_counter() - begun
    equal = subprocess.run(["diff", "-r", str(whole), str(often)], capture_output=True).returncode == 0
    shutil.rmtree(whole)
    shutil.rmtree(often)
    return {"equal": equal, "rest_s": rest_s, "whole_s": whole_s}


def _config(num_layers: int) -> ModelConfig:
    return load_config("deepseek-v3").replace(
        vocab_size=32768, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
        num_hidden_layers=num_layers, first_k_dense_replace=0, num_attention_heads=16, q_lora_rank=None,
        n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6, num_nextn_predict_layers=0,
    )  # fmt: skip


def _write_checkpoint(folder: Path, num_layers: int) -> int:
    """V2-Lite's layers, so many, in the released FP8 form; the largest tensor's bytes."""
    config = _config(num_layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for place in published_places(config):
        dtype = torch.float32 if place.is_gate_bias else torch.bfloat16
        if place.is_quantized:
            dtype = torch.float8_e4m3fn
            kinds[scale_name(place.name)] = (torch.float32, scale_shape((place.shape[0], place.shape[1])))
        kinds[place.name] = (dtype, place.shape)
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in sorted(kinds.items())}
    shards = plan_shards(sizes, SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for shard, names in shards.items():
        header, offsets = lay_out({name: kinds[name] for name in names})
        with (folder / shard).open("wb") as file:
            file.write(header)
            for name in offsets:
                file.write(as_bytes(_random(*kinds[name], generator), kinds[name][0]))
    index = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return max(sizes.values())


def _random(dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if dtype == torch.float8_e4m3fn:  # every finite value, as often of each sign
        codes = torch.randint(0, 254, shape, generator=generator, dtype=torch.uint8)
        return (codes + (codes >= 127)).view(torch.float8_e4m3fn)
    if dtype == torch.float32:
        return torch.rand(shape, generator=generator) * 1e-4
    return torch.randn(shape, generator=generator, dtype=dtype) * 0.02
