"""Whether a model fits this machine, at each precision: bytes of weights, cache and activations against what is free.

In: a config, tokens a sequence and sequences at once. Out: bytes by part, the verdict, and the most tokens a second
that reading the weights allows. Weights are counted over the real modules, built without memory, so that packed ones
are what they will be to the byte; activations are the largest that live together while a piece of a prompt is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fireflyer.checkpoint.safetensors_file import CHUNK_BYTES
from fireflyer.config import ModelConfig
from fireflyer.cost.memory import bf16_checkpoint_bytes, fp8_checkpoint_bytes
from fireflyer.cost.parameters import count_parameters
from fireflyer.evaluate.machine import Machine
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.paged_cache import slot_bytes
from fireflyer.model.decoder import Decoder
from fireflyer.model.packed import PackedFormat, packed_decoder

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp8", "int8", "int4")

_OPTIONS = EngineOptions()
_SCRATCH = CHUNK_BYTES
"""What reading the files, or the kernels of packed weights, take beside all that."""


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's numbers in memory, and of its files. FP8 is a form of files alone: it runs as bf16 or fp32.

    read: of the main model but for its routed experts, what each decode step reads. expert: of one routed expert.
    """

    total: int
    experts: int
    expert: int
    read: int
    disk: int


@dataclass(frozen=True)
class Fit:
    """One precision on one machine. Bytes; `total` is what a process that answers takes of memory at its peak."""

    precision: Precision
    weights: Weights
    cache: int
    activations: int
    process: int
    free: int
    disk_free: int
    step_s: float
    """Of one decode step of the whole batch, at the least: its bytes at the rate at which memory is read."""
    batch: int

    @property
    def decode_tokens_per_s(self) -> float:
        """At most, of all sequences together."""
        return self.batch / self.step_s

    @property
    def total(self) -> int:
        return self.weights.total + self.cache + self.activations + self.process

    @property
    def fits(self) -> bool:
        return self.total <= self.free + self.process  # what this process holds is taken already

    @property
    def fits_disk(self) -> bool:
        return self.weights.disk <= self.disk_free


def fit(
    config: ModelConfig,
    precision: Precision,
    context: int,
    batch: int,
    machine: Machine,
    weights: Weights | None = None,
) -> Fit:
    """What `batch` sequences of `context` tokens take, answered by the engine with its usual settings on a CPU.

    weights: as counted before, where the same model is asked about again.
    """
    weights = weights or count_weights(config, precision)
    number = torch.bfloat16 if precision in ("bf16", "fp8") else torch.float32
    cache = cache_bytes(config, context, batch, number)
    step = weights.read + experts_read(config, batch) * weights.expert
    step += batch * context * _slot(config, number, mtp=False)
    return Fit(
        precision,
        weights,
        cache,
        activation_bytes(config, context, batch),
        machine.process_bytes,
        machine.memory_free,
        machine.disk_free,
        step / machine.read_bytes_per_s,
        batch,
    )


@dataclass(frozen=True)
class Bounded:
    """What a limit on the experts' memory makes of a precision that doesn't fit: a rate if all experts are as likely,
    which real text beats."""

    limit: int
    share_resident: float
    decode_tokens_per_s: float


def bounded(config: ModelConfig, fitted: Fit, disk_bytes_per_s: float) -> Bounded | None:
    """With nine tenths of the memory that is left for experts; None where not even a token's worth of them goes in."""
    weights = fitted.weights
    rest = weights.total - weights.experts + fitted.cache + fitted.activations
    limit = int(0.9 * (fitted.free - rest))
    if not weights.expert or limit < config.num_experts_per_tok * weights.expert:
        return None
    share = min(limit / weights.experts, 1.0)
    read = (1 - share) * experts_read(config, fitted.batch) * weights.expert
    return Bounded(limit, share, fitted.batch / (fitted.step_s + read / disk_bytes_per_s))


def longest_context(config: ModelConfig, fitted: Fit, machine: Machine) -> int:
    """The most tokens a sequence with which the same batch fits; 0 where it never does."""
    low, high = 0, config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if fit(config, fitted.precision, middle, fitted.batch, machine, fitted.weights).fits:
            low = middle
        else:
            high = middle - 1
    return low


def count_weights(config: ModelConfig, precision: Precision) -> Weights:
    """Over the modules' own tensors."""
    packed = precision in ("int8", "int4")
    if packed:
        model = packed_decoder(config, PackedFormat("int8" if precision == "int8" else "int4"))
    else:
        with torch.device("meta"):
            model = Decoder(config).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.state_dict().items()}
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    layers = sum(config.is_moe(index) for index in range(config.num_layers_with_mtp))
    read = sum(
        size
        for name, size in sizes.items()
        if ".mlp.experts." not in name
        and not name.startswith("model.mtp.")
        and (name != "model.embed_tokens.weight" or (config.tie_word_embeddings and not packed))
    )
    total = sum(sizes.values())
    disk = {
        "fp32": 4 * count_parameters(config).checkpoint,
        "bf16": bf16_checkpoint_bytes(config),
        "fp8": fp8_checkpoint_bytes(config),
    }
    expert = experts // (layers * config.n_routed_experts) if experts else 0
    return Weights(total, experts, expert, read, disk.get(precision, total))


def experts_read(config: ModelConfig, batch: int) -> float:
    """Distinct experts, over all main layers, that a decode step of so many sequences reads if all are as likely."""
    layers = sum(config.is_moe(index) for index in range(config.num_hidden_layers))
    if not layers:
        return 0.0
    share = config.num_experts_per_tok / config.n_routed_experts
    return layers * config.n_routed_experts * (1 - (1 - share) ** batch)


def cache_bytes(config: ModelConfig, context: int, batch: int, dtype: torch.dtype) -> int:
    """Of whole blocks, MTP layers included: they draft by default."""
    slots = math.ceil(context / _OPTIONS.block_size) * _OPTIONS.block_size
    return batch * slots * _slot(config, dtype, mtp=True)


def _slot(config: ModelConfig, dtype: torch.dtype, *, mtp: bool) -> int:
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    return slot_bytes(layers, config.latent_dim, dtype)


def activation_bytes(config: ModelConfig, context: int, batch: int) -> int:
    """What a layer leaves behind while the last piece of a prompt is read, and the answers' logits.

    Attention and experts are not there at the same time, but what the one has freed seldom fits the other, so both
    count. All in fp32: bf16 products are summed, and their operands rearranged, in wider forms.
    """
    rows = min(context * batch, _OPTIONS.max_step_tokens)
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = max(config.qk_head_dim, config.v_head_dim)
    own = min(rows, context)  # of one sequence, which attends alone: queries, keys and values expanded, then padded
    attention = 3 * own * heads * width + context * heads * (config.qk_nope_head_dim + config.v_head_dim + 2 * width)
    mask = 0 if own == context else own * context * 5
    moe = rows * config.num_experts_per_tok * (hidden + 3 * config.moe_intermediate_size)
    dense = 3 * rows * config.intermediate_size
    routed = config.is_moe(config.num_hidden_layers - 1)
    logits = 3 * batch * config.vocab_size
    return 4 * (3 * rows * hidden + attention + (max(moe, dense) if routed else dense) + logits) + mask + _SCRATCH
