"""GGUF against llama.cpp: files of its own converter and quantiser load to their own dequantised values, and give
the logits and the greedy tokens that llama.cpp computes.

Two small models of random weights, V3's form (sigmoid, groups, gate bias, query latents, YaRN) and V2-Lite's (softmax,
none of these), their tokenizers included. From a quantised file llama.cpp computes with quantised activations, which
alone changes logits; so its own quantiser expands the file to fp32 first, by its own arithmetic, and what llama.cpp
computes from that has to be ours to rounding. What it computes from the file itself is shown beside.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _llama_cpp
from benchmarks._result import Proof, Table
from fireflyer import LLM, ModelConfig, SamplingParams, load_model, save_model
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.text.tokenizer import Tokenizer

FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "IQ4_XS")
LARGEST_DIFFERENCE = 1e-4
"""Of logits, as a share of their spread: what another order of sums in fp32 leaves."""
PROMPT_TOKENS, PREFIX, NEW_TOKENS = 48, 16, 32

_COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
}
_YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1}
MODELS: dict[str, dict[str, Any]] = {
    "V3": {
        "q_lora_rank": 256,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "V2-Lite": {
        "model_type": "deepseek_v2",
        "num_hidden_layers": 26,  # llama.cpp knows from it that there are no query latents
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
}


def main() -> Proof:
    figures: dict[str, Any] = {}
    rows: list[list[str]] = []
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fireflyer-gguf-") as folder:
        program = _logits_program(Path(folder))
        for name, shape in MODELS.items():
            checkpoint = _checkpoint(Path(folder) / name, shape)
            whole = _convert(checkpoint, Path(folder) / f"{name}.gguf")
            for kind in FORMATS:
                file = whole if kind == "F32" else _quantised(whole, kind)
                found = _compare(file, kind, checkpoint, program)
                figures.setdefault(name, {})[kind] = found
                rows.append(_row(name, kind, found))
                missed += [f"{name} {kind}: {what}" for what in _misses(found)]
    columns = [
        "model",
        "file",
        "tensors in it",
        "equal values",
        "logits differ",
        "equal tokens",
        "quantised activations",
    ]
    return Proof(figures, {"formats": Table(columns, rows)}, missed=missed)


def _row(name: str, kind: str, found: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count} {each}" for each, count in found["tensor_kinds"].items())
    equal = f"{found['equal_tensors']} of {found['tensors']}"
    differ, own = (f"{found[key]:.2g}" for key in ("logit_difference", "logit_difference_from_the_file"))
    return [name, kind, kinds, equal, differ, f"{found['greedy_equal']} of {NEW_TOKENS}", own]


def _misses(found: dict[str, Any]) -> list[str]:
    missed = []
    if found["equal_tensors"] != found["tensors"]:
        missed.append(f"{found['tensors'] - found['equal_tensors']} tensors differ from their dequantised values")
    if found["greedy_equal"] != NEW_TOKENS or found["logit_difference"] > LARGEST_DIFFERENCE:
        missed.append(f"logits differ by {found['logit_difference']:.2g}, {found['greedy_equal']} greedy tokens equal")
    return missed


def _checkpoint(folder: Path, shape: dict[str, Any]) -> Path:
    """A published folder with random weights, norms and gate biases apart from one another, and a tokenizer."""
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    tokenizer = Tokenizer.train([text], 1024)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model = Decoder(ModelConfig.from_dict({**_COMMON, **shape, **ends, "vocab_size": tokenizer.vocab_size}))
    generator = torch.Generator().manual_seed(1)
    init_weights_(model, generator)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.2, 0.2, generator=generator)
    save_model(model, folder)
    tokenizer.save(folder)
    return folder


_CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
sys.path.insert(1, sys.argv[1] + "/gguf-py")
from conversion import base
# Its list of known tokenizers is of hashes; what it would say of DeepSeek-V3's:
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
sys.argv = ["convert_hf_to_gguf.py", sys.argv[2], "--outfile", sys.argv[3], "--outtype", "f32"]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def _convert(checkpoint: Path, file: Path) -> Path:
    """By llama.cpp's own converter."""
    _llama_cpp.build("llama-quantize")
    _run(sys.executable, "-c", _CONVERT, str(_llama_cpp.sources()), str(checkpoint), str(file))
    return file


def _quantised(whole: Path, kind: str) -> Path:
    """By llama.cpp's own quantiser."""
    file = whole.with_name(f"{whole.stem}-{kind}.gguf")
    _run(str(_llama_cpp.build("llama-quantize")), "--allow-requantize", str(whole), str(file), kind)
    return file


def _logits_program(folder: Path) -> Path:
    program, made, sources = folder / "llama_logits", _llama_cpp.CACHE / "build", _llama_cpp.sources()
    libraries = ["src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a"]
    _llama_cpp.build("llama-quantize")
    _run(
        "c++", "-O2", "-std=c++17", f"-I{sources / 'include'}", f"-I{sources / 'ggml' / 'include'}",
        str(Path(__file__).with_name("llama_logits.cpp")), "-o", str(program),
        *(str(made / library) for library in libraries), "-fopenmp", "-lpthread", "-ldl",
    )  # fmt: skip
    return program


def _compare(file: Path, kind: str, checkpoint: Path, program: Path) -> dict[str, Any]:
    kinds, tensors, equal = _same_values(file)
    llm = LLM(file)
    ids = torch.randint(
        20, llm.config.vocab_size, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(2)
    ).tolist()
    with torch.inference_mode():
        ours = load_model(file)(torch.tensor([ids])).logits[0]
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    our_tokens = llm.generate([ids[:PREFIX]], params)[0].outputs[0].token_ids
    as_it_is, _ = _llama_cpp_answer(program, file, ids)
    theirs, their_tokens = _llama_cpp_answer(program, file if kind == "F32" else _quantised(file, "F32"), ids)
    pairs = zip(our_tokens, their_tokens, strict=True)
    _check_tokenizer(llm, checkpoint)
    return {
        "bytes": file.stat().st_size,
        "tensor_kinds": kinds,
        "tensors": tensors,
        "equal_tensors": equal,
        "logit_difference": _difference(ours, theirs),
        "same_choice": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        "greedy_equal": next((i for i, (a, b) in enumerate(pairs) if a != b), NEW_TOKENS),
        "logit_difference_from_the_file": _difference(ours, as_it_is),
    }


def _llama_cpp_answer(program: Path, file: Path, ids: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Logits (tokens, vocabulary), and the tokens that follow the prefix."""
    command = [str(program), str(file), str(PREFIX), str(NEW_TOKENS), *map(str, ids)]
    raw = bytearray(subprocess.run(command, capture_output=True, check=True).stdout)
    logits = torch.frombuffer(raw[: -4 * NEW_TOKENS], dtype=torch.float32).view(PROMPT_TOKENS, -1)
    return logits, np.frombuffer(raw[-4 * NEW_TOKENS :], np.int32).tolist()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square, as a share of the logits' own spread."""
    return float((ours - theirs).pow(2).mean().sqrt() / theirs.std())


def _check_tokenizer(llm: LLM, checkpoint: Path) -> None:
    # Without digits: trained tokenizers take them one by one, DeepSeek-V3's, which the file names, by threes.
    text = "The river, and some stones:\n\tdef f(x): return x  # 北京"
    assert llm.tokenizer is not None
    assert llm.tokenizer.encode_prompt(text) == Tokenizer.from_file(checkpoint).encode_prompt(text)


def _same_values(file: Path) -> tuple[dict[str, int], int, int]:
    """(how many tensors of each kind, published tensors, those that equal what the package dequantises)."""
    import gguf

    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    kinds: dict[str, int] = {}
    for tensor in stored.values():
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    values = {name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for name, tensor in stored.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, 64)
    checkpoint = open_checkpoint(file)
    equal = sum(
        np.array_equal(rows[:].float().numpy(), _expected(name, values, names))
        for name, rows in checkpoint.tensors.items()
    )
    return kinds, len(checkpoint.tensors), equal


def _expected(name: str, values: dict[str, np.ndarray], names: Any) -> np.ndarray:
    """A published tensor out of a file's own, by llama.cpp's mapping of names."""

    def own(published: str) -> np.ndarray:
        found = names.get_name(published, try_suffixes=(".weight", ".bias"))
        return values[found]

    if ".mlp.experts." in name:
        before, _, after = name.partition(".mlp.experts.")
        expert, _, kind = after.partition(".")
        return own(f"{before}.mlp.experts.{kind}")[int(expert)]
    if name.endswith("kv_b_proj.weight"):
        keys, queries = own(name.replace("kv_b", "k_b")), own(name.replace("kv_b", "v_b"))
        return np.concatenate([part for k, v in zip(keys, queries, strict=True) for part in (k.T, v)])
    return own(name.replace("e_score_correction_bias", "e_score_correction.bias"))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr[-3000:] or done.stdout[-3000:]}")
