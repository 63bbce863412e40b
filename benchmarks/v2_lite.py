"""A model of V2-Lite's exact shape (15.7 billion random weights) on two threads: packed here, and in llama.cpp.

Nobody trained these weights: only their number, shape and form decide the speed. Each form is written, measured and
deleted before the next, since two of them would fill a small disk. `python -m benchmarks.v2_lite --small` runs the same
at a hundredth of the size and writes nothing down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import _llama_cpp
from benchmarks._chart import Line, log_chart
from benchmarks._packed_speed import CACHED, CONTEXTS, NEW, PROMPT, REPEATS
from benchmarks._result import ROOT, Proof, Table
from fireflyer.checkpoint.packed import PackedPlan
from fireflyer.checkpoint.safetensors_file import TensorRows
from fireflyer.config import ModelConfig, load_config
from fireflyer.evaluate.machine import measure_read_bytes_per_s
from fireflyer.evaluate.speed import weight_bytes_per_step
from fireflyer.model.decoder import Decoder
from fireflyer.model.packed import PackedFormat, packed_decoder
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.numerics.integer import Kind, PackedShape
from fireflyer.numerics.linear import PackedLinear

THREADS = 2
PEERS: dict[Kind, _llama_cpp.Format] = {"int8": "Q8_0", "int4": "Q4_0"}
FLOORS = {"int8": (3.0, 1.3, 18.0), "int4": (3.0, 1.2, 10.5)}
"""Prompt and decode speed over the peer's, peak GiB."""
FIRST_TOKEN_S = 15.0
SPREAD = 0.02
"""Standard deviation of the weights: V2-Lite's own initial one."""
CHART = ROOT / "docs" / "quantisation-context.svg"


def main() -> Proof:
    """Both forms; under an hour, once llama.cpp is built."""
    found, shape = _measure(load_config("deepseek-v2-lite"))
    CHART.write_text(_chart(found), encoding="utf-8")
    return _proof(found, shape)


def _measure(config: ModelConfig) -> tuple[dict[str, Any], dict[str, int]]:
    torch.set_num_threads(THREADS)
    _llama_cpp.build()
    found = {}
    for kind, peer in PEERS.items():
        with _folder() as folder:
            path = folder / f"{peer}.gguf"
            _llama_cpp.write_model(path, config, peer)
            _warm(folder)
            found[peer] = _llama_cpp.bench(path, THREADS, PROMPT, NEW, REPEATS)
            print(f"{peer}: {found[peer]}", file=sys.stderr, flush=True)
        with _folder() as folder:
            step_bytes = write_random(folder, config, kind)
            _warm(folder)
            found[kind] = {"weight_bytes_per_token": step_bytes} | _ours(folder)
            found[kind]["file_bytes"] = sum(path.stat().st_size for path in folder.iterdir())
            print(f"{kind}: {found[kind]}", file=sys.stderr, flush=True)
    return found, {"layers": config.num_hidden_layers, "latent": config.latent_dim}


@contextmanager
def _folder() -> Iterator[Path]:
    """A new folder on the disk of the cache, which may be larger than the one for temporary files."""
    _llama_cpp.CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_llama_cpp.CACHE.parent) as folder:
        yield Path(folder)


def _warm(folder: Path) -> None:
    """Let the system have the files in memory, as they are after a first use."""
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(64 << 20):
                pass


def _ours(folder: Path) -> dict[str, Any]:
    bandwidth = measure_read_bytes_per_s()
    began = time.perf_counter()
    _child("first", folder)
    first_s = time.perf_counter() - began
    found = {"first_token_s": first_s, **_child("speed", folder), **_child("context", folder)}
    lesser = _child("speed", folder, FIREFLYER_NATIVE="vnni")  # the peer is built without AMX: what ours does so
    found["without_amx"] = {key: lesser[key] for key in ("prompt_tokens_per_s", "decode_tokens_per_s")}
    return found | {"read_bytes_per_s": max(bandwidth, measure_read_bytes_per_s())}


def _child(what: str, folder: Path, **env: str) -> dict[str, Any]:
    # As the command line does: threads that wait sleep soon, or any other busy process takes most of the speed.
    env = {"GOMP_SPINCOUNT": "10000"} | os.environ | env
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._packed_speed", what, str(folder), str(THREADS)],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def write_random(folder: Path, config: ModelConfig, kind: Kind) -> float:
    """A packed folder of random weights; returns the bytes of weights that a decode step reads."""
    fmt = PackedFormat(kind)
    model = packed_decoder(config, fmt)
    files: dict[str, dict[str, TensorRows]] = {}
    for name, rows in _random_rows(model):
        layer = int(name.split(".")[2]) + 2 if ".layers." in name else 1
        files.setdefault(f"model-{layer:05d}-of-{config.num_hidden_layers + 1:05d}.safetensors", {})[name] = rows
    PackedPlan(config.replace(quantization_config=fmt.to_dict()), files).write(folder)
    return weight_bytes_per_step(model, config.num_experts_per_tok)


def _random_rows(model: Decoder) -> Iterator[tuple[str, TensorRows]]:
    generator = np.random.Generator(np.random.SFC64(0))
    for name, module in model.named_modules():
        if isinstance(module, (PackedLinear, PackedExperts)):
            shapes = module.shapes if isinstance(module, PackedExperts) else (module.shape,)
            yield f"{name}.packed", _RandomBlocks(shapes, module.packed.shape[0], generator)
            continue
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            yield f"{name}.{leaf}", _RandomNumbers(tuple(tensor.shape), tensor.dtype, generator)


@dataclass(frozen=True)
class _RandomNumbers:
    shape: tuple[int, ...]
    dtype: torch.dtype
    generator: np.random.Generator

    def __getitem__(self, rows: slice, /) -> Tensor:
        count = len(range(*rows.indices(self.shape[0])))
        if len(self.shape) == 1:
            return torch.ones(count)
        return torch.from_numpy(self.generator.standard_normal((count, *self.shape[1:]), dtype=np.float32)) * SPREAD


@dataclass(frozen=True)
class _RandomBlocks:
    """Packed matrices of evenly distributed codes whose scale makes the weights spread as they should."""

    shapes: tuple[PackedShape, ...]
    count: int
    generator: np.random.Generator
    dtype: torch.dtype = torch.uint8

    @property
    def shape(self) -> tuple[int, int]:
        return self.count, sum(shape.num_bytes for shape in self.shapes)

    def __getitem__(self, rows: slice, /) -> Tensor:
        count = len(range(*rows.indices(self.count)))
        return torch.stack([torch.cat([self._block(shape) for shape in self.shapes]) for _ in range(count)])

    def _block(self, shape: PackedShape) -> Tensor:
        words = self.generator.integers(0, 2**64, shape.num_bytes // 8, dtype=np.uint64)
        block = torch.from_numpy(words).view(torch.uint8)
        step = 1 if shape.kind == "int8" else 8
        spread = (256 if shape.kind == "int8" else 16) / 12**0.5 * step
        block[shape.scales_at : shape.groups_at].view(torch.float32).fill_(SPREAD / spread)
        if shape.kind == "int4":
            block[shape.groups_at :] = step  # and zero 8, which is kept as 0
        return block


def _proof(found: dict[str, Any], shape: dict[str, int]) -> Proof:
    missed, speeds, limits = [], [], []
    for kind, peer in PEERS.items():
        own, other = found[kind], found[peer]
        own["prompt_ratio"] = own["prompt_tokens_per_s"] / other["prompt"]
        own["decode_ratio"] = own["decode_tokens_per_s"] / other["decode"]
        own["gb_per_s"] = own["decode_tokens_per_s"] * own["weight_bytes_per_token"] / 1e9
        own["bandwidth_share"] = own["gb_per_s"] * 1e9 / own["read_bytes_per_s"]
        plain = own["without_amx"]
        prompt, decode, memory = FLOORS[kind]
        missed += [
            f"{kind}: {what} {found_:.2f}, wanted {wanted:g}"
            for what, found_, wanted, met in (
                ("prompt speed over the peer's", own["prompt_ratio"], prompt, own["prompt_ratio"] >= prompt),
                ("decode speed over the peer's", own["decode_ratio"], decode, own["decode_ratio"] >= decode),
                ("first token, s", own["first_token_s"], FIRST_TOKEN_S, own["first_token_s"] <= FIRST_TOKEN_S),
                ("peak GiB", own["peak_gib"], memory, own["peak_gib"] <= memory),
            )
            if not met
        ]  # fmt: skip
        speeds += [
            [f"llama.cpp {peer}", f"{other['prompt']:.1f}", f"{other['decode']:.2f}", "1", "1"],
            [
                f"Fireflyer {kind.upper()}",
                f"{own['prompt_tokens_per_s']:.1f}",
                f"{own['decode_tokens_per_s']:.2f}",
                f"{own['prompt_ratio']:.1f}",
                f"{own['decode_ratio']:.2f}",
            ],
            [
                f"{kind.upper()} without AMX",
                f"{plain['prompt_tokens_per_s']:.1f}",
                f"{plain['decode_tokens_per_s']:.2f}",
                f"{plain['prompt_tokens_per_s'] / other['prompt']:.1f}",
                f"{plain['decode_tokens_per_s'] / other['decode']:.2f}",
            ],
        ]
        limits.append(
            [
                kind.upper(),
                f"{own['file_bytes'] / 1e9:.1f} GB",
                f"{own['first_token_s']:.1f} s",
                f"{own['peak_gib']:.1f} GiB",
                f"{own['weight_bytes_per_token'] / 1e9:.2f} GB",
                f"{own['gb_per_s']:.1f} GB/s, {own['bandwidth_share']:.0%} of {own['read_bytes_per_s'] / 1e9:.1f}",
            ]
        )
    columns = ["form", f"prompt of {PROMPT}, tokens/s", f"answer of {NEW}, tokens/s", "prompt, times", "answer, times"]
    folder = "files", "cached file to first token", f"peak memory, {CACHED:,} tokens cached", "weights read a token"
    tables = {
        "speed": Table(columns, speeds),
        "limits": Table(["form", *folder, "weights read a second"], limits),
        "context": _context_table(found, shape),
    }
    return Proof(found, tables, missed=missed)


def _context_table(found: dict[str, Any], shape: dict[str, int]) -> Table:
    rows = []
    for context in CONTEXTS:
        cached = context * shape["layers"] * shape["latent"] * 2
        cells = [f"{1 / found[kind]['seconds'][str(context)]:.2f}" for kind in PEERS]
        rows.append([f"{context:,}", f"{cached / 1e9:.2f} GB", *cells])
    return Table(["tokens before", "latents read a token", *(f"{kind.upper()}, tokens/s" for kind in PEERS)], rows)


def _chart(found: dict[str, Any]) -> str:
    """Seconds a token over context: measured, and what the latents' bytes alone would add at the memory's speed."""
    lines = []
    for kind, colour in (("int8", "#1f5fa8"), ("int4", "#b5541c")):
        seconds = found[kind]["seconds"]
        lines.append(Line(kind.upper(), [(max(c, 1024), 1 / seconds[str(c)]) for c in CONTEXTS], colour))
    title = "Decoding V2-Lite's shape: tokens a second by context (the first point: an empty one)"
    return log_chart(title, "tokens before", "tokens a second", [4096, 16384, 65536], lines)


if __name__ == "__main__":
    if "--small" in sys.argv:
        small = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "vocab_size": 4096}
        config = load_config("deepseek-v2-lite").replace(**small, num_attention_heads=4)
        print(json.dumps(_proof(*_measure(config)).tables["speed"].rows, indent=1))
    else:
        print(__doc__)
