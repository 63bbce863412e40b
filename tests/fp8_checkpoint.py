"""Random checkpoints laid out like the released FP8 files, written from the tensor listing alone, and naive oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from published_models import FAMILIES, naive_listing
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

SHAPE: dict[str, Any] = {
    **FAMILIES["v3"],
    "model_type": "deepseek_v3",
    "vocab_size": 150,
    "hidden_size": 136,
    "intermediate_size": 264,
    "moe_intermediate_size": 72,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": 130,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 64,
    "v_head_dim": 48,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "num_nextn_predict_layers": 1,
}
"""kv_a_proj_with_mqa has 576 rows, as in V3; hardly a side is a multiple of 128."""

PUBLISHED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def is_fp8(name: str) -> bool:
    return "_proj" in name and "eh_proj" not in name


def random_tensors(seed: int = 0) -> Tensors:
    """All tensors of the listing in bf16, gate biases in fp32, the MTP's copies equal to the main ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, shape in naive_listing(SHAPE).items():
        tensor = torch.randn(shape, generator=generator) * 0.05
        if name.endswith(("norm.weight", "layernorm.weight")):
            tensor = tensor + 1
        tensors[name] = tensor if "correction_bias" in name else tensor.bfloat16()
    for copy, original in MTP_COPIES.items():
        tensors[f"model.layers.2.{copy}"] = tensors[original].clone()
    return tensors


def naive_quantize(weight: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block: amax / 448 is the scale, 1 for a block of zeros."""
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].float()
            scale = block.abs().max() / 448
            if scale == 0:
                scale = torch.tensor(1.0)
            elif power_of_two:
                exponent = -149
                while torch.tensor(2.0) ** exponent < scale:
                    exponent += 1
                scale = torch.tensor(2.0) ** exponent
            scales[i, j] = scale
            quantized[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] = (block / scale).to(torch.float8_e4m3fn)
    return quantized, scales


def naive_dequantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Each value times its block's scale, in fp32."""
    rows = torch.arange(weight.shape[0])[:, None] // 128
    columns = torch.arange(weight.shape[1])[None, :] // 128
    return weight.float() * scales[rows, columns]


def write_fp8(folder: Path) -> Tensors:
    """An FP8 checkpoint in three shards, the scales apart from their weights; returns the exact values in fp32."""
    shards: list[Tensors] = [{}, {}, {}]
    values: Tensors = {}
    for number, (name, tensor) in enumerate(random_tensors().items()):
        if is_fp8(name):
            quantized, scales = naive_quantize(tensor)
            shards[number % 2][name], shards[2][f"{name}_scale_inv"] = quantized, scales
            values[name] = naive_dequantize(quantized, scales)
        else:
            shards[number % 2][name] = tensor
            values[name] = tensor.float()
    write_shards(folder, shards)
    write_config(folder, quantization_config=PUBLISHED)
    return values


def write_bf16(folder: Path) -> Tensors:
    """The same unquantised, in two shards."""
    tensors = random_tensors()
    halves = (sorted(tensors)[::2], sorted(tensors)[1::2])
    write_shards(folder, [{name: tensors[name] for name in half} for half in halves])
    write_config(folder)
    return tensors


def write_config(folder: Path, **changes: Any) -> None:
    config = {**SHAPE, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "configuration_deepseek.X"}, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (folder / name).write_text(f'{{"of": "{name}"}}')
    (folder / "configuration_deepseek.py").write_text("X = 1\n")


def write_shards(folder: Path, shards: list[Tensors]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
