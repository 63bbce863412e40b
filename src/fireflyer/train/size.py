"""The size dial: one number, the parameters, decides the model's shape, its learning rate, batch and tokens. No torch.

The shape follows V3's proportions as far as a small width allows. Batch and tokens follow the fits of DeepSeek LLM
(arXiv 2401.02954, section 3), which take the model's scale as M, the training FLOPs a token without the vocabulary:
tokens D = 5.8316 C^0.4757 where M = 0.1715 C^0.5243; for the compute C = M D of a run, whatever its length, a batch of
0.2920 C^0.3271 tokens. Its rate, 0.3118 C^-0.1250, is right for V2-Lite and V3 and four times too high for models of a
million parameters (swept here: docs/train.md); so the peak rate is V3's own 2.2e-4 at V3's compute, and grows to the
small ones by (3.5e24 / C)^0.075, which meets both sweeps.
"""

from __future__ import annotations

import math
from typing import Any

from fireflyer.config import ModelConfig
from fireflyer.cost.flops import training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.errors import UserError
from fireflyer.train.quantities import parse_quantity

V3_RATE, V3_COMPUTE = 2.2e-4, 3.5e24
SMALLEST, LARGEST = 200_000, 2_000_000_000_000
_WIDTH_STEP, _STEP = 16, 8
_MINIMUM_STEPS = 100
_EASY_ROWS = 8


def parse_size(text: str) -> int:
    """Parameters from "10M" or "1.5B". Raises UserError."""
    try:
        size = parse_quantity(text)
    except ValueError:
        size = 0
    if not SMALLEST <= size <= LARGEST:
        raise UserError(f"--size {text}: give total parameters between 200K and 2T, as --size 10M")
    return size


def sized_settings(size: int, *, vocab_size: int | None, tokens: int | None, steps: int | None) -> dict[str, Any]:
    """What the size decides of a recipe, as its nested tables.

    Args:
        size: parameters of the main model, embedding and head included.
        vocab_size: of the tokenizer that is given; None: one in proportion to the model, to be trained.
        tokens, steps: the run's length where the user gives it; learning rate and batch then fit that length.
    """
    vocab = vocab_size or _vocab_size(size)
    config = _config(_width(size, vocab), vocab, size)
    model = config.to_dict()
    seq_len = min(256 * 2 ** max(0, round(math.log(size / 10e6, 8))), 4096)
    scale = training_flops_per_token(config, seq_len) - 6 * vocab * config.hidden_size
    compute = (scale / 0.1715) ** (1 / 0.5243)
    if tokens is not None:
        compute = scale * tokens
    elif steps is not None:
        compute = (scale * steps * 0.2920) ** (1 / (1 - 0.3271))  # steps times the batch that this compute asks for
    tokens_of_run = compute / scale
    rows = max(1, round(min(_batch_tokens(compute), tokens_of_run / _MINIMUM_STEPS) / seq_len))
    if rows >= 4 * _EASY_ROWS:  # a batch that ranks and micro-batches can share
        rows = round(rows / _EASY_ROWS) * _EASY_ROWS
    rate = _rounded(V3_RATE * (V3_COMPUTE / compute) ** 0.075)
    settings: dict[str, Any] = {
        "batch_size": rows,
        "seq_len": seq_len,
        "model": model,
        "schedule": {"lr": rate, "cosine_lr": rate / 10},
    }
    if tokens is None and steps is None:
        settings["tokens"] = int(_rounded(tokens_of_run))
    return settings


def _batch_tokens(compute: float) -> float:
    return 0.2920 * compute**0.3271


def _rounded(value: float) -> float:
    """To two figures, so that a recipe reads well."""
    return float(f"{value:.1e}")


def _vocab_size(size: int) -> int:
    """A power of two that grows with the square root of the model: embedding and head stay a fraction of it."""
    return 2 ** min(max(round(math.log2(4096 * math.sqrt(size / 10e6))), 9), 17)


def _width(size: int, vocab: int) -> int:
    """The largest width whose model is not above `size`, its experts of the usual width."""
    below, above = 1, 4096
    while below < above:  # the count grows with the width
        middle = (below + above + 1) // 2
        if _total(_config_of(middle * _WIDTH_STEP, vocab, size, 1.0)) <= size:
            below = middle
        else:
            above = middle - 1
    return below * _WIDTH_STEP


def _config(width: int, vocab: int, size: int) -> ModelConfig:
    """The model of that width nearest to `size`, by the width of its experts."""
    candidates = [_config_of(width, vocab, size, 1 + step / 16) for step in range(17)]
    return min(candidates, key=lambda config: abs(_total(config) - size))


def _total(config: ModelConfig) -> int:
    return count_parameters(config).total


def _config_of(width: int, vocab: int, size: int, wider: float) -> ModelConfig:
    """Depth, heads, latents and experts for a width, in V3's proportions; its experts `wider` times as wide.

    What a small model can't have in proportion: V3's 61 layers of width 7168 (here one more for each 64 of width), its
    latent of width / 14 (here width / 4, as V2-Lite's), its 256 experts (here 16 to 256 by size, a 4th to a 32nd used).
    """
    head = 32 if width < 768 else 64 if width < 2048 else 128
    experts, chosen = (16, 4) if size < 30e6 else (32, 4) if size < 300e6 else (64, 6) if size < 30e9 else (256, 8)
    share = 0.5 if size < 30e6 else 0.375 if size < 30e9 else 0.28
    layers = min(max(3, 1 + round(width / 64)), 61)
    settings = {
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "initializer_range": 0.02 if width < 2048 else 0.006,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "first_k_dense_replace": 1 if layers < 40 else 3,
        "intermediate_size": _multiple(width * 2.75),
        "num_attention_heads": max(2, round(width / head * (1 if head < 128 else 2))),
        "q_lora_rank": min(_multiple(width * 0.375), 1536),
        "kv_lora_rank": min(_multiple(width * 0.25), 512),
        "qk_nope_head_dim": head,
        "qk_rope_head_dim": head // 2,
        "v_head_dim": head,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": _multiple(width * share * wider),
        "n_group": 8 if experts >= 256 else 4,
        "topk_group": 4 if experts >= 256 else 2,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    }
    return ModelConfig.from_dict(settings, source=f"--size {size}")


def _multiple(value: float) -> int:
    return max(_STEP, round(value / _STEP) * _STEP)
