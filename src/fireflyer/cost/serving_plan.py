"""Serving units: how fast prefill and decode go, what fits, what a million tokens costs. Arithmetic, no torch.

A unit is a number of GPUs that share the experts among them; attention is data-parallel, every GPU has all of it, as in
DeepSeek's production (prefill EP32, decode EP144; the V3 report has decode EP320). Each GPU holds one expert more than
an even share, for copies of the busy ones. Two micro-batches hide each other's all-to-all where that is faster. Loads
are taken as even and requests as never lacking: a service over a day reaches less.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.config import ModelConfig
from fireflyer.cost.hardware import Gpu, Hardware
from fireflyer.cost.layer_time import (
    Rank,
    Shape,
    block_times,
    elementwise_seconds,
    ffn_products,
    plain_product,
    swiglu_products,
)
from fireflyer.cost.layouts import RESERVED
from fireflyer.cost.parameters import cache_bytes_per_token, count_parameters

UNITS = (1, 2, 4, 8, 16, 32, 64, 72, 128, 144, 256, 320)
"""GPUs of the units tried, those of DeepSeek's production and of the V3 report among them."""

_FP8_WEIGHT = 1 + 4 / 128**2


@dataclass(frozen=True)
class ServingJob:
    """Requests of `prompt` tokens in and `output` out. `cache_hits`: the share of prompt tokens found in a cache.

    `mtp_acceptance`: how often the drafted second token holds; 0: no drafts. `least_tokens_per_s`: what each user gets.
    """

    config: ModelConfig
    hardware: Hardware
    gpu: Gpu
    count: int
    precision: str
    prompt: int
    output: int
    cache_hits: float = 0.0
    mtp_acceptance: float = 0.0
    least_tokens_per_s: float = 20.0
    prefill_tokens: int = 16384

    @property
    def cached_tokens(self) -> float:
        """In the cache of a request, on average over its output."""
        return self.prompt + self.output / 2


@dataclass(frozen=True)
class Unit:
    """One kind of unit. `batch`: tokens (prefill) or requests (decode) of a GPU at once; memory is of one GPU."""

    gpus: int
    experts_per_gpu: int
    batch: int
    step_s: float
    weights_bytes: float
    cache_bytes: float
    tokens_per_s_per_gpu: float
    micro_batches: int


@dataclass(frozen=True)
class ServingPlan:
    prefill: Unit
    decode: Unit


def plan_serving(job: ServingJob, prefill_gpus: int | None, decode_gpus: int | None) -> ServingPlan | None:
    """The fastest units per GPU that fit; None: not even the largest does."""
    prefills = [unit for gpus in _units(job, prefill_gpus) if (unit := prefill_unit(job, gpus))]
    decodes = [unit for gpus in _units(job, decode_gpus) if (unit := decode_unit(job, gpus))]
    if not prefills or not decodes:
        return None
    return ServingPlan(_best(prefills), _best(decodes))


def _best(units: list[Unit]) -> Unit:
    """The smallest unit whose speed per GPU is within 1% of the fastest's: a larger one is no gain, and fails whole."""
    fastest = max(unit.tokens_per_s_per_gpu for unit in units)
    return next(unit for unit in units if unit.tokens_per_s_per_gpu >= 0.99 * fastest)


def unit_complaint(job: ServingJob, prefill_gpus: int | None, decode_gpus: int | None, name: str) -> str:
    """Why there is no plan, with the nearest that fits: one line."""
    usable = job.gpu.memory_gb * (1 - RESERVED)
    kinds = [("prefill", prefill_gpus, prefill_unit), ("decode", decode_gpus, decode_unit)]
    kind, fixed, make = next(k for k in kinds if not any(k[2](job, gpus) for gpus in _units(job, k[1])))
    gpus = max(_units(job, fixed))
    held = weights_bytes(job.config, gpus, job.precision) / 1e9
    lead = (
        f"{name} in {job.precision} doesn't fit into {kind} units of {gpus} {job.gpu.name}: weights take {held:.1f} GB"
        f" of {usable:.1f} usable on each, beside cache and buffers"
    )
    fitting = [larger for larger in UNITS if make(job, larger)]
    if not fitting:
        return f"{lead}; give shorter prompts, another precision or a card with more memory"
    option = "--count" if fixed is None else f"--{kind}-unit"
    return f"{lead}; the nearest that fits is {option} {min(fitting)}"


def _units(job: ServingJob, fixed: int | None) -> list[int]:
    if fixed is not None:
        return [fixed]
    if not job.config.n_routed_experts:
        return [1]
    most = job.config.n_routed_experts + job.config.n_routed_experts // 4
    return [gpus for gpus in UNITS if gpus <= min(job.count, most)]


def experts_per_gpu(config: ModelConfig, gpus: int) -> int:
    """One more than an even share, for copies: 9 at EP32 and 2 at EP144 of V3's 256; all on a single GPU."""
    if gpus == 1:
        return config.n_routed_experts
    return config.n_routed_experts // gpus + 1


def weights_bytes(config: ModelConfig, gpus: int, precision: str) -> float:
    """On one GPU of a unit: everything but the routed experts, and its share of these. Without MTP."""
    counts = count_parameters(config)
    moe_layers = sum(config.is_moe(index) for index in range(config.num_hidden_layers))
    dense_layers = config.num_hidden_layers - moe_layers
    matrices = config.num_hidden_layers * counts.attention_layer + dense_layers * counts.dense_ffn_layer
    matrices += moe_layers * (counts.shared_experts + experts_per_gpu(config, gpus) * counts.routed_expert)
    plain = counts.embedding + counts.head + moe_layers * counts.router
    return matrices * (_FP8_WEIGHT if precision == "fp8" else 2.0) + 2.0 * plain


def room_for_cache(job: ServingJob, gpus: int, rows: int) -> float:
    """Bytes that one GPU has left beside weights, logits and one layer's numbers for so many rows."""
    config = job.config
    at_work = max(4 * config.vocab_size * min(rows, 1024), 4 * rows * config.num_attention_heads * config.qk_head_dim)
    drafting = 1 + 1 / config.num_hidden_layers if job.mtp_acceptance else 1.0  # the MTP module weighs about a layer
    used = weights_bytes(config, gpus, job.precision) * drafting + at_work
    return job.gpu.memory_gb * 1e9 * (1 - RESERVED) - used


def prefill_unit(job: ServingJob, gpus: int) -> Unit | None:
    """A unit that reads prompts, `prefill_tokens` a GPU at once; None: they don't fit."""
    config, tokens = job.config, max(job.prompt, job.prefill_tokens)
    cache = tokens * cache_bytes_per_token(config)
    if room_for_cache(job, gpus, tokens) < cache:
        return None
    seconds = []
    for micro_batches in (1, 2):
        rank = _rank(job, tokens // micro_batches, gpus, hides=micro_batches > 1)
        step = plain_product(rank, (tokens // job.prompt or 1, config.vocab_size, config.hidden_size, 1))
        for moe, layers in _layers(config):
            block = block_times(config, rank, moe)
            step += layers * _together(job, micro_batches, block.forward, block.exchange_forward)
        seconds.append((step, micro_batches))
    step, micro_batches = min(seconds)
    speed = tokens / step / (1 - job.cache_hits)
    return Unit(
        gpus,
        experts_per_gpu(config, gpus),
        tokens,
        step,
        weights_bytes(config, gpus, job.precision),
        cache,
        speed,
        micro_batches,
    )


def decode_unit(job: ServingJob, gpus: int) -> Unit | None:
    """A unit that writes answers, at the batch of most tokens while each user gets enough; None: it doesn't fit."""
    of_a_request = job.cached_tokens * cache_bytes_per_token(job.config)
    most = int(room_for_cache(job, gpus, 1024) // of_a_request)
    best = None
    for batch in _batches(most):
        step, micro_batches = decode_step(job, gpus, batch)
        if best is not None and (1 + job.mtp_acceptance) / step < job.least_tokens_per_s:
            break  # a larger batch is slower still
        speed = batch * (1 + job.mtp_acceptance) / step
        if best is None or speed > best.tokens_per_s_per_gpu:
            best = Unit(
                gpus,
                experts_per_gpu(job.config, gpus),
                batch,
                step,
                weights_bytes(job.config, gpus, job.precision),
                batch * of_a_request,
                speed,
                micro_batches,
            )
    return best


def _batches(most: int) -> list[int]:
    """1, 2, 4, 8, then steps of 8, and the largest."""
    return sorted({size for size in (1, 2, 4, *range(8, most + 1, 8), most) if 1 <= size <= most})


def decode_step(job: ServingJob, gpus: int, batch: int) -> tuple[float, int]:
    """Seconds of one step of a GPU's `batch` requests, and in how many micro-batches it goes."""
    rows_each = 2 if job.mtp_acceptance else 1  # the last token and the draft after it
    choices = []
    for micro_batches in (1, 2):
        if batch % micro_batches:
            continue
        requests = batch // micro_batches
        rows = requests * rows_each
        rank = _rank(job, rows, gpus, hides=False)  # the low-latency form takes no multiprocessors
        step = micro_batches * plain_product(rank, (rows, job.config.vocab_size, job.config.hidden_size, 1))
        for moe, layers in _layers(job.config):
            compute = decode_layer(job, rank, requests, rows_each, moe)
            step += layers * _together(job, micro_batches, compute, low_latency_seconds(job, rank) if moe else 0.0)
        if job.mtp_acceptance:
            step *= 1 + 1 / job.config.num_hidden_layers  # the draft: one more layer
        choices.append((step, micro_batches))
    return min(choices)


def _together(job: ServingJob, micro_batches: int, compute: float, exchange: float) -> float:
    """Seconds of one layer for all micro-batches, given those of one: two hide each other's exchange."""
    if micro_batches == 1:
        return compute + exchange
    return 2 * max(compute, exchange) / job.hardware.kernels.compute_busy


def decode_layer(job: ServingJob, rank: Rank, requests: int, rows_each: int, moe: bool) -> float:
    """Compute seconds of a layer in the absorbed form: scores and sums over the latents themselves."""
    config, gpu, kernels = job.config, rank.gpu, job.hardware.kernels
    hidden, heads, rows = config.hidden_size, config.num_attention_heads, rank.tokens
    down = config.latent_dim + (config.q_lora_rank or 0)
    products = [
        (rows, down, hidden, 1),
        (rows, heads * config.qk_head_dim, config.q_lora_rank or hidden, 1),
        (rows, hidden, heads * config.v_head_dim, 1),
    ]
    products += expert_products(config, rows, rank.ep) if moe else ffn_products(config, rows, 1, False)
    seconds = sum(job.hardware.product_seconds(gpu, job.precision, "inference", shape) for shape in products)
    for columns, depth in ((config.kv_lora_rank, config.qk_nope_head_dim), (config.v_head_dim, config.kv_lora_rank)):
        seconds += plain_product(rank, (rows, columns, depth, heads))
    cached = requests * job.cached_tokens
    operations = 2 * cached * rows_each * heads * (config.latent_dim + config.kv_lora_rank)
    seconds += max(
        operations / (gpu.peak("bf16") * kernels.decode_attention),
        2 * cached * config.latent_dim / (gpu.memory_gb_per_s * 1e9 * kernels.decode_attention_memory),
    )
    return seconds + elementwise_seconds(config, rank, moe) / 3


def expert_products(config: ModelConfig, rows: int, gpus: int) -> list[Shape]:
    """Of routed experts what comes to one GPU when every GPU of the unit has so many rows; and the shared ones."""
    sent = rows * config.num_experts_per_tok
    busy = min(experts_per_gpu(config, gpus), sent)
    width = config.moe_intermediate_size
    products = swiglu_products(config.hidden_size, width, max(1, round(sent / busy)), busy)
    if config.n_shared_experts:
        products += swiglu_products(config.hidden_size, config.n_shared_experts * width, rows, 1)
    return products


def low_latency_seconds(job: ServingJob, rank: Rank) -> float:
    """Dispatch and combine of one layer by DeepEP's low-latency kernels, in proportion to the bytes sent."""
    rates, config = job.hardware.all_to_all, job.config
    if rank.ep == 1:
        return 0.0
    measured = min(rates.low_latency_us, key=lambda known: (abs(known - rank.ep), known))
    dispatch, combine = rates.low_latency_us[measured]
    slower = (
        rates.measured_nvlink / rank.gpu.nvlink_gb_per_s
        if rank.ep <= rank.gpu.gpus_per_node
        else rates.measured_network / rank.gpu.network_gb_per_s
    )
    size = rank.tokens / rates.low_latency_tokens * config.num_experts_per_tok * config.hidden_size / (8 * 7168)
    wider = 1.0 if job.precision == "fp8" else 2.0
    return (dispatch * wider + combine) * 1e-6 * size * slower


def _rank(job: ServingJob, tokens: int, gpus: int, hides: bool) -> Rank:
    return Rank(job.hardware, job.gpu, job.precision, max(1, tokens), job.prompt, 1, gpus, "none", hides)


def _layers(config: ModelConfig) -> list[tuple[bool, int]]:
    moe = sum(config.is_moe(index) for index in range(config.num_hidden_layers))
    return [(is_moe, count) for is_moe, count in ((False, config.num_hidden_layers - moe), (True, moe)) if count]
