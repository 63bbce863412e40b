"""Seconds of one block of the decoder on one rank: products, attention, elementwise work, exchange of tokens. No torch.

In: a model's shape, how many tokens a rank has, how experts and context are spread. Out: compute seconds of forward,
backward and weight gradients, and the seconds of all-to-all that a schedule may hide or not. V3 report, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

from fireflyer.config import ModelConfig
from fireflyer.cost.hardware import Gpu, Hardware

RECOMPUTATIONS = ("none", "selective", "full")
"""none: all activations are kept. selective: V3's choice, norms, MLA's up-projections and SwiGLU are computed again.
full: of each layer only the input is kept."""

_SCALES = 1 + 4 / 128
"""Bytes of an FP8 number with its share of the FP32 scale of 128."""


@dataclass(frozen=True)
class BlockTimes:
    """Compute seconds, `backward` with `weights` in it; the all-to-all's seconds of the forward and the backward."""

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0
    exchange_forward: float = 0.0
    exchange_backward: float = 0.0

    def __add__(self, other: BlockTimes) -> BlockTimes:
        return BlockTimes(*(a + b for a, b in zip(_numbers(self), _numbers(other), strict=True)))

    def __mul__(self, factor: float) -> BlockTimes:
        return BlockTimes(*(factor * a for a in _numbers(self)))


def _numbers(times: BlockTimes) -> tuple[float, ...]:
    return times.forward, times.backward, times.weights, times.exchange_forward, times.exchange_backward


@dataclass(frozen=True)
class Rank:
    """What a rank computes with. `tokens` are its own, of sequences of `seq_len` spread over `cp` ranks."""

    hardware: Hardware
    gpu: Gpu
    precision: str
    tokens: int
    seq_len: int
    cp: int
    ep: int
    recompute: str
    hides_exchange: bool

    @property
    def sms_share(self) -> float:
        """The multiprocessors left where all-to-all runs beside the products."""
        if not self.hides_exchange or self.ep == 1:
            return 1.0
        return 1 - self.hardware.kernels.communication_sms / self.gpu.sms


def block_times(config: ModelConfig, rank: Rank, moe: bool) -> BlockTimes:
    """One layer, with routed experts or dense."""
    tokens = rank.tokens
    products = attention_products(config, tokens, rank.cp) + ffn_products(config, tokens, rank.ep, moe)
    forward = sum(_seconds(rank, "forward", shape) for shape in products)
    inputs = sum(_seconds(rank, "input_gradient", _swapped(shape)) for shape in products)
    weights = sum(_seconds(rank, "weight_gradient", _turned(shape)) for shape in products)
    if moe:
        gate = plain_product(rank, (tokens, config.n_routed_experts, config.hidden_size, 1))
        forward, inputs, weights = forward + gate, inputs + gate, weights + gate
    attention, attention_backward = _attention(config, rank)
    elementwise = elementwise_seconds(config, rank, moe)
    forward += attention + elementwise / 3
    inputs += attention_backward + elementwise * 2 / 3
    exchange = exchange_seconds(config, rank) if moe else 0.0
    gathered = _context_seconds(config, rank)
    again, exchanged_again = 0.0, 0.0
    if rank.recompute == "full":
        again, exchanged_again = forward, exchange + gathered
    elif rank.recompute == "selective":
        again = sum(_seconds(rank, "forward", shape) for shape in _up_projections(config, tokens, rank.cp))
    return BlockTimes(
        forward=forward,
        backward=inputs + weights + again,
        weights=weights,
        exchange_forward=exchange + gathered,
        exchange_backward=exchange + gathered + exchanged_again,
    )


def head_times(config: ModelConfig, rank: Rank) -> BlockTimes:
    """The output head on all tokens, in BF16."""
    seconds = plain_product(rank, (rank.tokens, config.vocab_size, config.hidden_size, 1))
    return BlockTimes(forward=seconds, backward=2 * seconds, weights=seconds)


def mtp_times(config: ModelConfig, rank: Rank) -> BlockTimes:
    """All MTP depths: joint projection in BF16, a layer, and the shared head again."""
    if not config.num_nextn_predict_layers:
        return BlockTimes()
    joint = plain_product(rank, (rank.tokens, config.hidden_size, 2 * config.hidden_size, 1))
    projection = BlockTimes(forward=joint, backward=2 * joint, weights=joint)
    layer = block_times(config, rank, config.is_moe(config.num_hidden_layers))
    return (projection + layer + head_times(config, rank)) * config.num_nextn_predict_layers


Shape = tuple[int, int, int, int]
"""(rows, columns, depth, groups) of a product: groups times (rows, depth) by (depth, columns)."""


def attention_products(config: ModelConfig, tokens: int, cp: int) -> list[Shape]:
    """MLA's projections in training and prefill; keys and values are made anew for all gathered tokens."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    down = [(tokens, config.latent_dim, hidden, 1)]
    if config.q_lora_rank is not None:
        down.append((tokens, config.q_lora_rank, hidden, 1))
    return [*down, *_up_projections(config, tokens, cp), (tokens, hidden, heads * config.v_head_dim, 1)]


def _up_projections(config: ModelConfig, tokens: int, cp: int) -> list[Shape]:
    heads, rank = config.num_attention_heads, config.q_lora_rank
    keys_and_values = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return [
        (tokens, heads * config.qk_head_dim, config.hidden_size if rank is None else rank, 1),
        (tokens * cp, keys_and_values, config.kv_lora_rank, 1),
    ]


def ffn_products(config: ModelConfig, tokens: int, ep: int, moe: bool) -> list[Shape]:
    """The dense network, or the routed experts that a rank holds, evenly loaded, and the shared ones."""
    hidden = config.hidden_size
    if not moe:
        return swiglu_products(hidden, config.intermediate_size, tokens, 1)
    held = max(1, config.n_routed_experts // ep)
    rows = max(1, round(tokens * config.num_experts_per_tok / held))
    products = swiglu_products(hidden, config.moe_intermediate_size, rows, held)
    if config.n_shared_experts:
        products += swiglu_products(hidden, config.n_shared_experts * config.moe_intermediate_size, tokens, 1)
    return products


def swiglu_products(hidden: int, width: int, rows: int, groups: int) -> list[Shape]:
    """Gate and up as one, and down, of `groups` networks with so many rows each."""
    return [(rows, 2 * width, hidden, groups), (rows, hidden, width, groups)]


def numbers_written(config: ModelConfig, moe: bool) -> int:
    """Numbers that a layer's products and its attention write per token: what elementwise work is in proportion to."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    latents = config.latent_dim + (config.q_lora_rank or 0)
    up = heads * (config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim)
    attention = latents + up + heads * config.v_head_dim + hidden
    if not moe:
        return attention + 2 * config.intermediate_size + hidden
    experts = config.num_experts_per_tok + config.n_shared_experts
    return attention + experts * (2 * config.moe_intermediate_size + hidden)


def elementwise_seconds(config: ModelConfig, rank: Rank, moe: bool) -> float:
    """Norms, rotation, casts, transpositions, SwiGLU, sorting by expert: forward and backward."""
    moved = rank.hardware.kernels.elementwise_bytes * numbers_written(config, moe) * rank.tokens
    return moved / (rank.gpu.memory_gb_per_s * 1e9)


def exchange_seconds(config: ModelConfig, rank: Rank) -> float:
    """Dispatch and combine of one layer, one direction: the slower of the network between nodes and NVLink in them."""
    if rank.ep == 1:
        return 0.0
    gpu, rates = rank.gpu, rank.hardware.all_to_all
    sent = config.hidden_size * (_SCALES if rank.precision == "fp8" else 2)
    returned = 2 * config.hidden_size

    def seconds(copies: float, link_gb_per_s: float, shares: tuple[float, float]) -> float:
        return rank.tokens * copies / (link_gb_per_s * 1e9) * (sent / shares[0] + returned / shares[1])

    within = min(rank.ep, gpu.gpus_per_node)
    longest = seconds(places_reached(config, rank.ep), gpu.nvlink_gb_per_s, _nearest(rates.nvlink, within))
    if rank.ep > gpu.gpus_per_node:
        nodes = -(-rank.ep // gpu.gpus_per_node)
        network = seconds(places_reached(config, nodes), gpu.network_gb_per_s, _nearest(rates.network, rank.ep))
        longest = max(longest, network)
    return longest


def places_reached(config: ModelConfig, places: int) -> float:
    """Of so many nodes or GPUs with equal shares of the experts, how many a token goes to: the mean over even routing.

    The chosen experts lie in `topk_group` of the `n_group` groups; experts lie on the places in their order.
    """
    shape = config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group
    return _places_reached(*shape, places)


@lru_cache(maxsize=4096)
def _places_reached(experts: int, chosen: int, groups: int, open_groups: int, places: int) -> float:
    held = [[0] * groups for _ in range(places)]
    for expert in range(experts):
        held[expert * places // experts][expert * groups // experts] += 1
    reachable = experts // groups * open_groups
    opened = list(combinations(range(groups), open_groups))
    reached = sum(
        1 - _none_of(reachable, sum(of_group[group] for group in open_ones), chosen)
        for of_group in held
        for open_ones in opened
    )
    return reached / len(opened)


def _none_of(all_of_them: int, special: int, drawn: int) -> float:
    """The chance that none of `special` is among `drawn` of `all_of_them`."""
    return comb(all_of_them - special, drawn) / comb(all_of_them, drawn)


def plain_product(rank: Rank, shape: Shape) -> float:
    """Seconds of a product that stays in BF16."""
    return rank.hardware.product_seconds(rank.gpu, "bf16", "forward", shape, rank.sms_share)


def _seconds(rank: Rank, direction: str, shape: Shape) -> float:
    return rank.hardware.product_seconds(rank.gpu, rank.precision, direction, shape, rank.sms_share)


def _swapped(shape: Shape) -> Shape:
    """The product of the input's gradient."""
    rows, columns, depth, groups = shape
    return rows, depth, columns, groups


def _turned(shape: Shape) -> Shape:
    """The product of the weight's gradient."""
    rows, columns, depth, groups = shape
    return columns, depth, rows, groups


def _attention(config: ModelConfig, rank: Rank) -> tuple[float, float]:
    """Causal attention, forward and backward, in BF16; the backward has five products, three of them of queries."""
    pairs = rank.tokens * rank.seq_len / 2 * config.num_attention_heads
    queries, values = config.qk_head_dim, config.v_head_dim
    peak = rank.gpu.peak("bf16") * rank.sms_share
    kernels = rank.hardware.kernels
    forward = 2 * pairs * (queries + values) / (peak * kernels.attention_forward)
    backward = 2 * pairs * (3 * queries + 2 * values) / (peak * kernels.attention_backward)
    return forward, backward


def _context_seconds(config: ModelConfig, rank: Rank) -> float:
    """Gathering the other context ranks' latents in BF16."""
    if rank.cp == 1:
        return 0.0
    received = rank.tokens * (rank.cp - 1) * config.latent_dim * 2
    return received / (rank.gpu.network_gb_per_s * 1e9)


def _nearest(rates: dict[int, tuple[float, float]], count: int) -> tuple[float, float]:
    return rates[min(rates, key=lambda known: (abs(known - count), known))]
