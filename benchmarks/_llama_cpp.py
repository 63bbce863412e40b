"""llama.cpp on this machine, and a model of random weights in its file format.

Built once from the sources that `llama-cpp-python`'s source distribution carries, into a cache folder that later runs
reuse. A file in Q8_0 or Q4_0 is written block by block: nobody trained it, and only its shape decides the speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fireflyer.config import ModelConfig

VERSION = "0.3.36"
CACHE = Path(os.environ.get("FIREFLYER_PROOF_CACHE", Path.home() / ".cache" / "fireflyer-proof")) / "llama.cpp"

Format = Literal["Q8_0", "Q4_0"]

_BLOCK = 32
_ROWS_AT_ONCE = 1 << 22


def sources() -> Path:
    """llama.cpp's own source folder, once anything of it was built."""
    return CACHE / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"


def build(name: str = "llama-bench") -> Path:
    """Path of one of its programs, made for this machine's own processor."""
    binary = CACHE / "build" / "bin" / name
    if binary.is_file():
        return binary
    CACHE.mkdir(parents=True, exist_ok=True)
    tools = _build_tools()
    carrier = CACHE / f"llama_cpp_python-{VERSION}"
    if not carrier.is_dir():
        _run(
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
            "--dest", str(CACHE), f"llama-cpp-python=={VERSION}",
        )  # fmt: skip
        with tarfile.open(CACHE / f"{carrier.name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    options = (*_processor(), "BUILD_SHARED_LIBS=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF")
    _run(
        str(tools / "cmake"), "-S", str(sources()), "-B", str(CACHE / "build"), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_SERVER=OFF", *(f"-D{option}" for option in options),
    )  # fmt: skip
    _run(str(tools / "cmake"), "--build", str(CACHE / "build"), "--target", name)
    return binary


def _processor() -> list[str]:
    """Options for this machine's instructions; AMX is left out, as it ends in a crash with latent attention."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        flags = []
    if "amx_int8" not in flags:
        return ["GGML_NATIVE=ON"]
    wide = ["AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"]  # every CPU with AMX has these
    return ["GGML_NATIVE=OFF", *(f"GGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "BMI2", "FMA", "F16C", *wide))]


def _build_tools() -> Path:
    """Folder with cmake and ninja: the system's, or an environment of their own."""
    found = shutil.which("cmake")
    if found and shutil.which("ninja", path=str(Path(found).parent)):
        return Path(found).parent
    folder = CACHE / "tools"
    if not (folder / "bin" / "ninja").exists():
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "cmake", "ninja")
    return folder / "bin"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-2000:] or done.stdout[-2000:]}")


def bench(model: Path, threads: int, prompt: int, new_tokens: int, repeats: int, depth: int = 0) -> dict[str, float]:
    """Tokens a second as llama-bench says with its own defaults: `prompt`, `decode`; 0 tokens leave one out."""
    done = subprocess.run(
        [str(build()), "-m", str(model), "-t", str(threads), "-p", str(prompt), "-n", str(new_tokens),
         "-r", str(repeats), "-d", str(depth), "-o", "json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"llama-bench failed: {done.stderr[-2000:]}")
    found = {}
    for row in json.loads(done.stdout):
        found["prompt" if row["n_prompt"] else "decode"] = float(row["avg_ts"])
    return found


def write_model(path: Path, config: ModelConfig, kind: Format, seed: int = 0) -> None:
    """A deepseek2 file whose kv_b is split per head, as llama.cpp's own converter writes it; in Q4_0 the head is Q8_0,
    since that is what matters most after rounding."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "deepseek2")
    _write_shape(writer, config)
    tensors = list(_tensors(config, kind))
    types = {name: GGMLQuantizationType[of] for name, of in (("Q8_0", "Q8_0"), ("Q4_0", "Q4_0"), ("F32", "F32"))}
    for name, shape, of in tensors:
        stored = (*shape[:-1], shape[-1] // _BLOCK * _BLOCK_BYTES[of]) if of != "F32" else shape
        dtype = np.dtype(np.float32) if of == "F32" else np.dtype(np.uint8)
        size = int(np.prod(stored, dtype=np.int64)) * dtype.itemsize
        writer.add_tensor_info(name, stored, dtype, size, types[of])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    generator = np.random.Generator(np.random.SFC64(seed))
    with path.open("ab") as file:
        for _, shape, of in tensors:
            _pad(file)
            for block in _random_values(generator, shape, of):
                file.write(block.data)
        _pad(file)


_BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18}
# A block is an fp16 scale and its numbers; uniform ones of this scale spread as widely as initial weights do, 0.02.
_SCALES = {"Q8_0": 0.02 / 74, "Q4_0": 0.02 / 4.6}


def _random_values(generator: np.random.Generator, shape: tuple[int, ...], of: str) -> Iterator[np.ndarray]:
    count = int(np.prod(shape, dtype=np.int64))
    if of == "F32":
        yield np.ones(count, np.float32) if len(shape) == 1 else generator.normal(0, 0.02, count).astype(np.float32)
        return
    blocks, size = count // _BLOCK, _BLOCK_BYTES[of]
    scale = np.frombuffer(np.float16(_SCALES[of]).tobytes(), np.uint8)
    while blocks:
        part = min(blocks, _ROWS_AT_ONCE)
        words = generator.integers(0, 2**64, -(-part * size // 8), dtype=np.uint64)
        values = words.view(np.uint8)[: part * size].reshape(part, size)
        values[:, :2] = scale
        yield values
        blocks -= part


def _pad(file: Any, alignment: int = 32) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _write_shape(writer: Any, config: ModelConfig) -> None:
    """The keys that llama.cpp's converter writes for this architecture; latent attention counts as one wide head."""
    latent = config.kv_lora_rank
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_vocab_size(config.vocab_size)
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + config.qk_rope_head_dim)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_tokenizer_model("none")
    scaling = config.rope_scaling
    if scaling is not None:
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_log_mul(0.1 * scaling.mscale_all_dim)


def _tensors(config: ModelConfig, kind: Format) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape with the inner axis last, format) of every tensor, without a query latent, as V2-Lite has none."""
    assert config.q_lora_rank is None
    assert config.topk_method == "greedy"
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    yield "token_embd.weight", (config.vocab_size, hidden), kind
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (config.vocab_size, hidden), "Q8_0"
    for layer in range(config.num_hidden_layers):
        name = f"blk.{layer}"
        yield f"{name}.attn_norm.weight", (hidden,), "F32"
        yield f"{name}.attn_q.weight", (heads * config.qk_head_dim, hidden), kind
        yield f"{name}.attn_kv_a_mqa.weight", (config.latent_dim, hidden), kind
        yield f"{name}.attn_kv_a_norm.weight", (latent,), "F32"
        yield f"{name}.attn_k_b.weight", (heads, latent, config.qk_nope_head_dim), kind
        yield f"{name}.attn_v_b.weight", (heads, config.v_head_dim, latent), kind
        yield f"{name}.attn_output.weight", (hidden, heads * config.v_head_dim), kind
        yield f"{name}.ffn_norm.weight", (hidden,), "F32"
        if not config.is_moe(layer):
            yield f"{name}.ffn_gate.weight", (config.intermediate_size, hidden), kind
            yield f"{name}.ffn_up.weight", (config.intermediate_size, hidden), kind
            yield f"{name}.ffn_down.weight", (hidden, config.intermediate_size), kind
            continue
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        shared = config.n_shared_experts * width
        yield f"{name}.ffn_gate_inp.weight", (experts, hidden), "F32"
        yield f"{name}.ffn_gate_exps.weight", (experts, width, hidden), kind
        yield f"{name}.ffn_up_exps.weight", (experts, width, hidden), kind
        yield f"{name}.ffn_down_exps.weight", (experts, hidden, width), kind
        yield f"{name}.ffn_gate_shexp.weight", (shared, hidden), kind
        yield f"{name}.ffn_up_shexp.weight", (shared, hidden), kind
        yield f"{name}.ffn_down_shexp.weight", (hidden, shared), kind
