"""FP8 products and a training step on a card, for the day that one is at hand: python -m benchmarks.gpu.fp8

Products of V3's own shapes by torch's block-wise scaled_mm, by DeepGEMM where it is installed, and in bf16; then steps
of one MoE model in bf16 and in FP8. Without a card that can, one line says why not, with exit code 2. Not run so far.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch

from benchmarks._result import Proof, Table, write_result
from fireflyer import ModelConfig
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.model.fp8_layers import use_fp8
from fireflyer.numerics.fp8_matmul import fp8_product, unavailable
from fireflyer.numerics.fp8_tiles import BLOCK, ROW_TILE, Tiled, quantize_tiles
from fireflyer.train.losses import training_losses

TOKENS, LENGTH, ROWS, ROUNDS = 4096, 4096, 2, 20
PRODUCTS = {
    "q_a_proj": (1536, 7168),
    "q_b_proj": (24576, 1536),
    "kv_b_proj": (32768, 512),
    "o_proj": (7168, 16384),
    "gate and up of an expert": (4096, 7168),
    "down of an expert": (7168, 2048),
    "gate and up of a dense layer": (36864, 7168),
}
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 8,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "max_position_embeddings": LENGTH,
}


def main() -> int:
    """Writes benchmarks/results/gpu-fp8.json."""
    if (reason := _missing()) is not None:
        print(f"benchmarks.gpu.fp8: {reason}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    products = {name: _product_rates(*shape) for name, shape in PRODUCTS.items()}
    steps = {name: _step_rate(name == "fp8") for name in ("bf16", "fp8")}
    kinds = list(next(iter(products.values())))
    rows = [[name, *(f"{rates[kind]:,.0f}" for kind in kinds)] for name, rates in products.items()]
    tables = {
        "products": Table([f"TFLOPS, {TOKENS:,} tokens", *kinds], rows),
        "steps": Table(["products", "tokens/s"], [[name, f"{rate:,.0f}"] for name, rate in steps.items()]),
    }
    figures = {"tflops": products, "tokens_per_s": steps, "card": torch.cuda.get_device_name()}
    print(write_result("gpu-fp8", Proof(figures, tables), time.perf_counter() - began))
    return 0


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA card on this machine; run it where there is a Hopper card"
    return unavailable("cuda")


def _product_rates(outputs: int, inputs: int) -> dict[str, float]:
    """TFLOPS by kind; quantising is left out, as it is part of the work before."""
    x, weight = (torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16) for rows in (TOKENS, outputs))
    a, b = quantize_tiles(x, ROW_TILE), quantize_tiles(weight, BLOCK)
    ways: dict[str, Callable[[], object]] = {"bf16": lambda: x @ weight.T, "scaled_mm": lambda: fp8_product(a, b)}
    if find_spec("deep_gemm") is not None:
        ways["DeepGEMM"] = _deep_gemm(a, b)
    return {name: 2e-12 * TOKENS * outputs * inputs / _seconds(way) for name, way in ways.items()}


def _deep_gemm(a: Tiled, b: Tiled) -> Callable[[], object]:
    import deep_gemm  # pyright: ignore[reportMissingImports]

    out = torch.empty(a.values.shape[0], b.values.shape[0], device="cuda", dtype=torch.bfloat16)
    return lambda: deep_gemm.fp8_gemm_nt((a.values, a.scales), (b.values, b.scales), out)


def _step_rate(narrow: bool) -> float:
    """Tokens a second of forward and backward, with recomputation."""
    config = ModelConfig.from_dict(SHAPE)
    model = Decoder(config)
    init_weights_(model, torch.Generator().manual_seed(0))
    model.to("cuda")
    if narrow:
        use_fp8(model)
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            terms = training_losses(
                model.trunk(ids, recompute=True),
                model.head_weight,
                ids,
                None,
                num_experts_per_tok=config.num_experts_per_tok,
                valid_in_batch=ids.numel(),
                rows_in_batch=ROWS,
            )
        terms.total(0.0, 1e-4).backward()
        model.zero_grad()

    return ids.numel() / _seconds(step)


def _seconds(work: Callable[[], object]) -> float:
    """The median of several rounds, after three that don't count."""
    found = []
    for _ in range(3 + ROUNDS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        found.append(began.elapsed_time(ended) / 1e3)
    return median(found[3:])


if __name__ == "__main__":
    sys.exit(main())
