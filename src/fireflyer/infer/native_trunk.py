"""A decoding step by the native kernels: all layers in one call, attention on the paged cache where it lies.

In: the rows of a step, few of them. Out: hidden states after the last norm, and the experts chosen. Beside
`Decoder.trunk`, its oracle, this saves what a small step mostly costs: the overhead of some hundred operations a layer.
It reads the module's own weights, fp32, bf16 or packed, copies none but bf16 norms, and follows them when they change.

Shapes: N rows · D hidden_size · K experts a token · R rotary width.
"""

from __future__ import annotations

import ctypes
import time
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fireflyer.config import LATENT_NORM_EPS
from fireflyer.infer.pace import Pace
from fireflyer.infer.paged_cache import PagedCache
from fireflyer.infer.scheduler import Span
from fireflyer.model.block import Block
from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import Experts, MoE, Routing
from fireflyer.model.mtp import MTPModule
from fireflyer.model.norm import RMSNorm
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.model.rope import rope_amplitude, rope_cos_sin, rope_frequencies, softmax_scale
from fireflyer.model.stored_experts import StoredExperts
from fireflyer.numerics.linear import PackedLinear
from fireflyer.numerics.native.library import BF16, FP32, INT8, ExpertTable, Library, Matrix, dense_matrix, library

MOST_ROWS = 64
"""Of a step; beyond, torch's products over many rows are the faster ones."""

_CACHE_KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.int8: INT8}


class _Experts(ctypes.Structure):
    """FFExperts of native.h."""

    _fields_ = (
        ("table", c_void_p),
        ("experts", c_int32),
        ("hidden", c_int32),
        ("width", c_int32),
        ("kind", c_int32),
    )


class _Layer(ctypes.Structure):
    """FFLayer of decode.c."""

    _fields_ = (
        *((name, Matrix) for name in ("q_a", "q_b", "kv_a", "kv_b", "o", "gate_up", "down", "router")),
        *((name, c_void_p) for name in ("input_norm", "q_norm", "kv_norm", "post_norm", "router_bias")),
        ("experts", _Experts),
        ("slots", c_void_p),
        ("scales", c_void_p),
        ("indices", c_void_p),
    )


class _Decoder(ctypes.Structure):
    """FFDecoder of decode.c."""

    _fields_ = (
        ("layers", POINTER(_Layer)),
        ("last_norm", c_void_p),
        *((name, c_float) for name in ("norm_eps", "latent_eps", "softmax_scale", "routed_scale")),
        *((name, c_int32) for name in ("num_layers", "hidden", "heads", "nope", "rope", "value", "latent")),
        *((name, c_int32) for name in ("top_k", "groups", "open_groups", "sigmoid", "best_two", "normalise")),
        ("cache_kind", c_int32),
        ("block_size", c_int32),
    )


class _Step(ctypes.Structure):
    """FFStep of decode.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "y", "h", "routed", "weights", "memory")),
        *((name, c_void_p) for name in ("positions", "targets", "tables", "table_starts", "cos", "sin")),
        *((name, c_int32) for name in ("rows", "first", "last")),
    )


@dataclass(frozen=True)
class NativeRows:
    """Where the rows of a step stand: positions, slots of their latents, and the blocks that each sees."""

    positions_N: Tensor
    targets_N: Tensor
    tables: Tensor
    table_starts_N: Tensor
    last_position: int

    @classmethod
    def of(cls, spans: Sequence[Span], block_size: int) -> NativeRows:
        """The spans' rows, one span after the other."""
        positions: list[int] = []
        targets: list[int] = []
        tables: list[int] = []
        starts: list[int] = []
        for span in spans:
            blocks = span.answer.blocks
            starts += [len(tables)] * span.num_rows
            tables += blocks[: -(-span.stop // block_size)]
            for position in range(span.start, span.stop):
                positions.append(position)
                targets.append(blocks[position // block_size] * block_size + position % block_size)
        return cls(_int64(positions), _int64(targets), _int64(tables), _int64(starts), max(positions))


class NativeTrunk:
    """A decoder's layers and its cache as the kernels take them; `native_trunk` makes it where it can be."""

    def __init__(self, kernels: Library, model: Decoder, cache: PagedCache) -> None:
        self._kernels, self._model, self._cache = kernels, model, cache
        config = model.config
        self._main = _Stack(model, [_block(layer) for layer in model.model.layers], model.model.norm, cache)
        self._mtp: list[_Stack] = []
        # Only the depths that draft have a place in the cache.
        for module in list(model.model.mtp)[: len(cache.slots) - config.num_hidden_layers]:
            assert isinstance(module, MTPModule)
            self._mtp.append(_Stack(model, [module.block], module.norm, cache))
        self._frequencies = rope_frequencies(config)
        self._amplitude = rope_amplitude(config.rope_scaling)
        self._cos = self._sin = torch.empty(0, config.qk_rope_head_dim // 2)
        kernels.raw.ff_decode.argtypes = [POINTER(_Decoder), POINTER(_Step), ctypes.c_int]
        kernels.raw.ff_decode.restype = None
        kernels.raw.ff_decode_bytes.argtypes = kernels.raw.ff_decode.argtypes
        kernels.raw.ff_decode_bytes.restype = c_int64
        self._memory = torch.empty(0, dtype=torch.uint8)

    def trunk(self, token_ids: Sequence[int], rows: NativeRows) -> tuple[Tensor, list[Routing]]:
        """(N, D) after the last norm, and what each MoE layer chose (without its scores)."""
        x_ND = self._model.model.embed_tokens(_int64(token_ids)).float()
        return self._run(self._main, x_ND, rows)

    def mtp(self, depth: int, hidden_ND: Tensor, next_ids: Sequence[int], rows: NativeRows) -> Tensor:
        """One MTP depth over the rows, as `Decoder.mtp_step`: (N, D) after its norm."""
        module = self._model.model.mtp[depth]
        assert isinstance(module, MTPModule)
        dtype = module.norm.weight.dtype
        embeds_ND = self._model.model.embed_tokens(_int64(next_ids)).to(dtype)
        joined = torch.cat((module.enorm(embeds_ND), module.hnorm(hidden_ND.to(dtype))), dim=-1)
        return self._run(self._mtp[depth], module.eh_proj(joined).float(), rows)[0]

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """(X, V) fp32."""
        head = self._model.lm_head
        matrix = head.matrix() if isinstance(head, PackedLinear) else dense_matrix(self._model.head_weight)
        return self._kernels.linear(hidden_XD.float(), matrix)

    def _run(self, stack: _Stack, x_ND: Tensor, rows: NativeRows) -> tuple[Tensor, list[Routing]]:
        count = x_ND.shape[0]
        stack.refresh()
        chosen = stack.choose_into(count)
        y_ND, h_ND, routed_ND = (torch.empty_like(x_ND) for _ in range(3))
        weights_NK = torch.empty(count, self._model.config.num_experts_per_tok)
        self._reach(rows.last_position)
        step = _Step(
            *(tensor.data_ptr() for tensor in (x_ND, y_ND, h_ND, routed_ND, weights_NK, self._memory)),
            *(tensor.data_ptr() for tensor in (rows.positions_N, rows.targets_N, rows.tables, rows.table_starts_N)),
            *(self._cos.data_ptr(), self._sin.data_ptr(), count),
        )
        threads = stack.pace.threads(count, torch.get_num_threads())
        needed = self._kernels.raw.ff_decode_bytes(stack.decoder, step, threads)
        if needed > len(self._memory):
            self._memory = torch.empty(2 * needed, dtype=torch.uint8)
            step.memory = self._memory.data_ptr()
        seconds = 0.0
        for stop in stack.stops:
            step.last = stop
            seconds += self._timed(stack, step, threads)
            if stop < stack.num_layers or stack.ends_in_store:
                layer, experts = stack.stored[stop - 1]
                routed_ND.copy_(experts.by_kernels(self._kernels, h_ND, chosen[layer], weights_NK))
            step.first = stop
        if stack.ends_in_store:
            seconds += self._timed(stack, step, threads)
        stack.pace.took(count, threads, seconds)
        none = torch.empty(0)
        return y_ND, [Routing(layer, none, indices_NK, (1, count)) for layer, indices_NK in chosen.items()]

    def _timed(self, stack: _Stack, step: _Step, threads: int) -> float:
        began = time.perf_counter()
        self._kernels.raw.ff_decode(stack.decoder, step, threads)
        return time.perf_counter() - began

    def _reach(self, position: int) -> None:
        """Have cosines and sines up to a position."""
        have = self._cos.shape[0]
        if position >= have:
            positions = torch.arange(max(position + 1, 2 * have, 512))
            self._cos, self._sin = rope_cos_sin(self._frequencies, positions, self._amplitude)


class _Stack:
    """Some layers and the norm after them, described for the kernels."""

    def __init__(self, model: Decoder, blocks: Sequence[Block], last_norm: RMSNorm, cache: PagedCache) -> None:
        self._model, self._blocks, self._last_norm, self._cache = model, blocks, last_norm, cache
        self._tensors = [
            tensor for module in (*blocks, last_norm) for tensor in (*module.parameters(), *module.buffers())
        ]
        self._seen: list[tuple[int, int]] = []
        self.pace = Pace()
        self.num_layers = len(blocks)
        self.stored: dict[int, tuple[int, PackedExperts | StoredExperts]] = {
            place: (block.layer_index, experts)
            for place, block in enumerate(blocks)
            if isinstance(block.mlp, MoE) and (experts := _in_store(block.mlp.experts)) is not None
        }
        """By place in the stack: the layer, and experts that have to be fetched before they can be computed."""
        self.ends_in_store = self.num_layers - 1 in self.stored
        self.stops = sorted({self.num_layers, *(place + 1 for place in self.stored)})

    def refresh(self) -> None:
        """Describe the layers anew where a tensor lies elsewhere, or a copied one has changed."""
        seen = [
            (tensor.data_ptr(), 0 if tensor.dtype == torch.float32 else tensor._version) for tensor in self._tensors
        ]
        if seen != self._seen:
            self._seen = seen
            self._kept: list[Tensor | ExpertTable] = []
            self._layers = (_Layer * len(self._blocks))(*(self._layer(block) for block in self._blocks))
            self._routed = {
                block.layer_index: layer
                for block, layer in zip(self._blocks, self._layers, strict=True)
                if isinstance(block.mlp, MoE)
            }
            self.decoder = self._describe()

    def choose_into(self, count: int) -> dict[int, Tensor]:
        """By layer, fresh memory for the experts that `count` rows choose."""
        indices_LNK = torch.empty(len(self._routed), count, self._model.config.num_experts_per_tok, dtype=torch.int64)
        address, layer_bytes = indices_LNK.data_ptr(), indices_LNK[:1].nbytes
        for place, layer in enumerate(self._routed.values()):
            layer.indices = address + place * layer_bytes
        return dict(zip(self._routed, indices_LNK.unbind(), strict=True))

    def _describe(self) -> _Decoder:
        config = self._model.config
        grouped = config.n_group > 1 and config.topk_method != "greedy"
        return _Decoder(
            layers=self._layers,
            last_norm=self._fp32(self._last_norm.weight),
            norm_eps=config.rms_norm_eps,
            latent_eps=LATENT_NORM_EPS,
            softmax_scale=softmax_scale(config),
            routed_scale=config.routed_scaling_factor,
            num_layers=len(self._blocks),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
            top_k=config.num_experts_per_tok,
            groups=config.n_group if grouped else 1,
            open_groups=config.topk_group if grouped else 1,
            sigmoid=config.scoring_func == "sigmoid",
            best_two=config.topk_method == "noaux_tc",
            normalise=config.norm_topk_prob,
            cache_kind=_CACHE_KINDS[self._cache.slots.dtype],
            block_size=self._cache.block_size,
        )

    def _layer(self, block: Block) -> _Layer:
        attention, config = block.self_attn, self._model.config
        layer = _Layer(
            q_b=_matrix(attention.q_b_proj if attention.has_q_latent else attention.q_proj),
            kv_a=_matrix(attention.kv_a_proj_with_mqa),
            kv_b=_matrix(attention.kv_b_proj),
            o=_matrix(attention.o_proj),
            input_norm=self._fp32(block.input_layernorm.weight),
            kv_norm=self._fp32(attention.kv_a_layernorm.weight),
            post_norm=self._fp32(block.post_attention_layernorm.weight),
            slots=self._cache.slots[block.layer_index].data_ptr(),
            scales=self._cache.scales[block.layer_index].data_ptr(),
        )
        if attention.has_q_latent:
            layer.q_a = _matrix(attention.q_a_proj)
            layer.q_norm = self._fp32(attention.q_a_layernorm.weight)
        dense = block.mlp.shared_experts if isinstance(block.mlp, MoE) else block.mlp
        if dense is not None:
            layer.gate_up, layer.down = _matrix(dense.gate_up_proj), _matrix(dense.down_proj)
        if isinstance(block.mlp, MoE):
            gate = block.mlp.gate
            layer.router = dense_matrix(gate.weight)
            if gate.e_score_correction_bias is not None:
                layer.router_bias = self._fp32(gate.e_score_correction_bias)
            layer.experts.experts = config.n_routed_experts
            if _in_store(block.mlp.experts) is None:
                table = _expert_table(block.mlp.experts)
                self._kept.append(table)
                layer.experts = _Experts(
                    table.addresses.data_ptr(), config.n_routed_experts, table.hidden, table.width, table.kind
                )
        return layer

    def _fp32(self, weight: Tensor) -> int:
        wide = weight.detach().float()
        self._kept.append(wide)
        return wide.data_ptr()


def native_trunk(model: Decoder, cache: PagedCache) -> NativeTrunk | None:
    """None where torch has to compute: no kernels here, another device, odd dtypes."""
    kernels = library()
    if kernels is None or model.device.type != "cpu" or not all(map(_is_known, model.modules())):
        return None
    return NativeTrunk(kernels, model, cache)


def _int64(numbers: Sequence[int]) -> Tensor:
    """(N,), at a third of the time that torch takes to read a list. numbers: one at least."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, MoE) and type(module.experts) not in (Experts, PackedExperts, StoredExperts):
        return False  # experts of several ranks, which travel
    if isinstance(module, Experts):
        return module.down_proj.dtype in (torch.float32, torch.bfloat16)
    if isinstance(module, StoredExperts):
        return module.dtype in (torch.float32, torch.bfloat16)
    return not isinstance(module, nn.Linear) or module.weight.dtype in (torch.float32, torch.bfloat16)


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module


def _matrix(layer: nn.Module) -> Matrix:
    if isinstance(layer, PackedLinear):
        return layer.matrix()
    assert isinstance(layer, nn.Linear)
    return dense_matrix(layer.weight)


def _in_store(experts: nn.Module) -> PackedExperts | StoredExperts | None:
    if isinstance(experts, StoredExperts) or (isinstance(experts, PackedExperts) and experts.store is not None):
        return experts
    return None


def _expert_table(experts: nn.Module) -> ExpertTable:
    if isinstance(experts, PackedExperts):
        return ExpertTable.stacked(experts.packed, experts.shapes)
    assert isinstance(experts, Experts)
    return ExpertTable.dense(experts.gate_up_proj, experts.down_proj)
