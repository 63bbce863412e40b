"""DeepSeek models in GGUF files, opened as checkpoints: the published names, each with its dequantised rows.

In: a file of llama.cpp's architecture `deepseek2`, which is V2, V2-Lite, V3, R1, Moonlight and Kimi-K2, as llama.cpp's
converter writes it and its quantiser shrinks it. Out: what `open_checkpoint` gives for a folder. Compared with the
published files the experts of a layer are stacked, kv_b may lie apart as k_b (per head, transposed: it is what absorbed
queries are multiplied with) and v_b, and rotary dimensions stay interleaved pairs. src/models/deepseek2.cpp and
conversion/deepseek.py of llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fireflyer.checkpoint.gguf_config import ARCHITECTURE, config_from_gguf
from fireflyer.checkpoint.gguf_file import GET_ALL, GGUF, GGUFTensor, is_gguf, read_gguf
from fireflyer.checkpoint.names import GATE_BIAS, Place, published_places
from fireflyer.checkpoint.safetensors_file import rows_per_chunk
from fireflyer.config import ModelConfig
from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.text.gguf_tokenizer import tokenizer_from_gguf
from fireflyer.text.tokenizer import Tokenizer

__all__ = ["gguf_config", "gguf_tokenizer", "is_gguf", "open_gguf"]

_IGNORED = ("rope_freqs.weight",)
"""Follow from the metadata."""

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_JOINED_EXPERTS = "ffn_gate_up_exps"


@dataclass(frozen=True)
class GGUFRows:
    """A published tensor within one of a file's: `shape`, from the stored tensor's row `first` on."""

    stored: GGUFTensor
    shape: tuple[int, ...]
    first: int = 0

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def __getitem__(self, rows: slice, /) -> Tensor:
        if len(self.shape) == 1:
            return self.stored.rows(0, 1)[0, rows]
        start, stop, _ = rows.indices(self.shape[0])
        return self.stored.rows(self.first + start, self.first + stop)


@dataclass(frozen=True)
class GGUFKeysAndValues:
    """kv_b_proj out of k_b (heads, latent, keys) and v_b (heads, values, latent): a head's keys, then its values."""

    keys: GGUFTensor
    values: GGUFTensor

    @property
    def shape(self) -> tuple[int, ...]:
        heads, latent, width = self.keys.shape
        return heads * (width + self.values.shape[1]), latent

    @property
    def path(self) -> Path:
        return self.keys.path

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype if self.keys.dtype == self.values.dtype else torch.bfloat16

    def __getitem__(self, rows: slice, /) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        (_, latent, width), value_width = self.keys.shape, self.values.shape[1]
        height = width + value_width
        first, last = start // height, -(-stop // height)
        heads = []
        for head in range(first, last):
            keys = self.keys.rows(head * latent, (head + 1) * latent).float()
            heads += [keys.T, self.values.rows(head * value_width, (head + 1) * value_width).float()]
        whole = torch.cat(heads) if heads else torch.empty(0, latent)
        return whole[start - first * height : stop - first * height]


GGUFPublished = GGUFRows | GGUFKeysAndValues


def open_gguf(path: str | Path) -> tuple[ModelConfig, dict[str, GGUFPublished]]:
    """The config and every published tensor of a `deepseek2` file; headers alone are read. Raises UserError."""
    file = read_gguf(path)
    config = config_from_gguf(file)
    tensors: dict[str, GGUFPublished] = {}
    used: set[str] = set(_IGNORED)
    for place in published_places(config):
        stored = _kept_as(place, config)
        if place.copy_of is not None:
            used.add(stored[0].name)
            _check_copy(file, stored[0].name, tensors[place.copy_of])
            tensors[place.name] = tensors[place.copy_of]
        elif place.name.endswith("self_attn.kv_b_proj.weight"):
            tensors[place.name] = _keys_and_values(file, place, stored[0], config)
            used |= {stored[0].name, *_apart(stored[0].name)}
        else:
            tensors[place.name] = rows = _rows(file, place, stored)
            used.add(rows.stored.name)
    if unused := sorted(file.tensors.keys() - used):
        path = file.tensors[unused[0]].path
        raise UserError(f"{path}: {shown(unused[0], 120)} has no place in a {ARCHITECTURE} model; {GET_ALL}")
    return config, tensors


def gguf_config(path: str | Path) -> ModelConfig:
    """The config in a file's metadata. Raises UserError."""
    return config_from_gguf(read_gguf(path))


def gguf_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer in a file's metadata; None where it has none. Raises UserError."""
    file = read_gguf(path)
    return tokenizer_from_gguf(file.metadata, str(file.path))


@dataclass(frozen=True)
class _Kept:
    """One way in which a file may keep a published tensor: within which of its tensors, from which row on."""

    name: str
    shape: tuple[int, ...]
    first: int = 0


def _kept_as(place: Place, config: ModelConfig) -> list[_Kept]:
    """The ways a file may keep a published tensor, in order of preference."""
    name = place.name.removesuffix(".weight")
    if name in _WHOLE:
        return [_Kept(f"{_WHOLE[name]}.weight", place.shape)]
    _, _, layer, part = name.split(".", 3)
    block = f"blk.{layer}."
    if part.endswith(GATE_BIAS):
        return [_Kept(f"{block}exp_probs_b.bias", place.shape)]
    if place.expert is not None:
        return [_Kept(f"{block}{kept.name}.weight", kept.shape, kept.first) for kept in _stacks(place, config)]
    kept = [_Kept(f"{block}{_LAYER[part]}.weight", place.shape)]
    return [*kept, _Kept("output_norm.weight", place.shape)] if part == "shared_head.norm" else kept


def _stacks(place: Place, config: ModelConfig) -> list[_Kept]:
    """An expert lies among its layer's, gate and up perhaps one behind the other."""
    experts, expert, (rows, columns) = config.n_routed_experts, place.expert or 0, place.shape
    kind = place.name.removesuffix(".weight").rpartition(".")[2]
    kept = [_Kept(_EXPERTS[kind], (experts, rows, columns), expert * rows)]
    if kind != "down_proj":
        first = (2 * expert + (kind == "up_proj")) * rows
        kept.append(_Kept(_JOINED_EXPERTS, (experts, 2 * rows, columns), first))
    return kept


def _rows(file: GGUF, place: Place, kept: list[_Kept]) -> GGUFRows:
    for way in kept:
        if (stored := file.tensors.get(way.name)) is not None:
            return GGUFRows(_checked(stored, way.shape), place.shape, way.first)
    names = " or ".join(way.name for way in kept)
    raise UserError(f"{file.path}: {names} is missing, which its metadata asks for; {GET_ALL}")


def _keys_and_values(file: GGUF, place: Place, joined: _Kept, config: ModelConfig) -> GGUFPublished:
    """kv_b as one, as older files have it, or apart."""
    parts = [file.tensors.get(name) for name in _apart(joined.name)]
    if joined.name in file.tensors or None in parts:
        return _rows(file, place, [joined])
    keys, values = (part for part in parts if part is not None)
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    return GGUFKeysAndValues(
        _checked(keys, (heads, latent, config.qk_nope_head_dim)), _checked(values, (heads, config.v_head_dim, latent))
    )


def _apart(joined: str) -> tuple[str, str]:
    return joined.replace("attn_kv_b", "attn_k_b"), joined.replace("attn_kv_b", "attn_v_b")


def _checked(stored: GGUFTensor, shape: tuple[int, ...]) -> GGUFTensor:
    if stored.shape != shape:
        raise UserError(
            f"{stored.path}: {stored.name} has shape {stored.shape}, but the metadata makes it {shape}; {GET_ALL}"
        )
    return stored


def _check_copy(file: GGUF, name: str, original: GGUFPublished) -> None:
    """The model has one embedding and one head: an MTP layer's copy of them must be equal. Where the two are quantised
    differently they still mean the same numbers, and the main one is taken."""
    copy = file.tensors.get(name)
    assert isinstance(original, GGUFRows)
    if copy is None or copy.kind != original.stored.kind:
        return
    _checked(copy, original.shape)
    step = rows_per_chunk(copy.shape)
    for start in range(0, copy.num_rows, step):
        stop = min(start + step, copy.num_rows)
        if not torch.equal(copy.rows(start, stop), original[start:stop]):
            raise UserError(f"{copy.path}: {name} differs from {original.stored.name}, and the model shares the two")
