"""The published tensor names, and the place of each in the model.

In: a ModelConfig. Out: every tensor that a published checkpoint of it holds, with its shape and the rows of the model's
parameter that it fills: the model stacks experts and joins gate and up projections, the files hold each alone. MTP
depth d is layer `num_hidden_layers + d` there, with its own copies of embedding and head. Names as listed from the
released V3 files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from fireflyer.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
GATE_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Place:
    """One published tensor: `shape` in the file, and where its values live in the model's state_dict."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    copy_of: str | None = None
    """The published tensor whose values a further MTP layer repeats."""

    @property
    def is_gate_bias(self) -> bool:
        """Kept in fp32 whatever the checkpoint's dtype: rounded, it would choose other experts."""
        return self.name.endswith(GATE_BIAS)

    @property
    def is_quantized(self) -> bool:
        """Whether FP8 releases hold it in FP8: attention and feed-forward projections, but not the MTP's eh_proj."""
        projection = self.name.rpartition(".weight")[0]
        return projection.endswith(("_proj", "_proj_with_mqa")) and not projection.endswith("eh_proj")

    def view(self, state: Mapping[str, Tensor]) -> Tensor:
        """Its values within a state_dict of the model, without copying."""
        tensor = state[self.parameter]
        if self.expert is not None:
            tensor = tensor[self.expert]
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


def scale_name(name: str) -> str:
    """Name of the FP8 scales of a weight."""
    return f"{name}_scale_inv"


def published_names(config: ModelConfig) -> list[str]:
    """Sorted names of all tensors of a published checkpoint, FP8 scales among them where the config is quantised."""
    places = list(published_places(config))
    is_fp8 = config.quantization_config is not None and not config.is_packed
    scales = [scale_name(place.name) for place in places if place.is_quantized] if is_fp8 else []
    return sorted([*scales, *(place.name for place in places)])


def published_places(config: ModelConfig) -> Iterator[Place]:
    """Every tensor of a published checkpoint, in the model's order."""
    embedding_shape = (config.vocab_size, config.hidden_size)
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    yield Place(EMBEDDING, embedding_shape, EMBEDDING)
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer, f"model.layers.{layer}", f"model.layers.{layer}")
    yield _whole("model.norm", "model.norm", config.hidden_size)
    if not config.tie_word_embeddings:
        yield Place(HEAD, embedding_shape, HEAD)
    for depth in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + depth
        published, own = f"model.layers.{layer}", f"model.mtp.{depth}"
        yield Place(f"{published}.embed_tokens.weight", embedding_shape, EMBEDDING, copy_of=EMBEDDING)
        yield _whole(f"{published}.enorm", f"{own}.enorm", config.hidden_size)
        yield _whole(f"{published}.hnorm", f"{own}.hnorm", config.hidden_size)
        yield _whole(f"{published}.eh_proj", f"{own}.eh_proj", config.hidden_size, 2 * config.hidden_size)
        yield from _block(config, layer, published, f"{own}.block")
        yield _whole(f"{published}.shared_head.norm", f"{own}.norm", config.hidden_size)
        yield Place(f"{published}.shared_head.head.weight", embedding_shape, head, copy_of=head)


def _whole(published: str, own: str, *shape: int) -> Place:
    return Place(f"{published}.weight", shape, f"{own}.weight")


def _block(config: ModelConfig, layer: int, published: str, own: str) -> Iterator[Place]:
    hidden = config.hidden_size
    yield _whole(f"{published}.input_layernorm", f"{own}.input_layernorm", hidden)
    yield _whole(f"{published}.post_attention_layernorm", f"{own}.post_attention_layernorm", hidden)
    for name, *shape in _attention(config):
        yield _whole(f"{published}.self_attn.{name}", f"{own}.self_attn.{name}", *shape)
    if not config.is_moe(layer):
        yield from _swiglu(hidden, config.intermediate_size, f"{published}.mlp", f"{own}.mlp")
        return
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    yield _whole(f"{published}.mlp.gate", f"{own}.mlp.gate", experts, hidden)
    if config.topk_method == "noaux_tc":
        yield Place(f"{published}.mlp.gate.{GATE_BIAS}", (experts,), f"{own}.mlp.gate.{GATE_BIAS}")
    for expert in range(experts):
        yield from _expert(hidden, width, expert, f"{published}.mlp.experts.{expert}", f"{own}.mlp.experts")
    if config.n_shared_experts:
        shared = config.n_shared_experts * width
        yield from _swiglu(hidden, shared, f"{published}.mlp.shared_experts", f"{own}.mlp.shared_experts")


def _attention(config: ModelConfig) -> Iterator[tuple[str, int] | tuple[str, int, int]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    if config.q_lora_rank is None:
        yield "q_proj", heads * config.qk_head_dim, hidden
    else:
        yield "q_a_proj", config.q_lora_rank, hidden
        yield "q_a_layernorm", config.q_lora_rank
        yield "q_b_proj", heads * config.qk_head_dim, config.q_lora_rank
    yield "kv_a_proj_with_mqa", config.latent_dim, hidden
    yield "kv_a_layernorm", latent
    yield "kv_b_proj", heads * (config.qk_nope_head_dim + config.v_head_dim), latent
    yield "o_proj", hidden, heads * config.v_head_dim


def _swiglu(hidden: int, width: int, published: str, own: str) -> Iterator[Place]:
    joined = f"{own}.gate_up_proj.weight"
    yield Place(f"{published}.gate_proj.weight", (width, hidden), joined, rows=(0, width))
    yield Place(f"{published}.up_proj.weight", (width, hidden), joined, rows=(width, 2 * width))
    yield _whole(f"{published}.down_proj", f"{own}.down_proj", hidden, width)


def _expert(hidden: int, width: int, expert: int, published: str, own: str) -> Iterator[Place]:
    joined = f"{own}.gate_up_proj"
    yield Place(f"{published}.gate_proj.weight", (width, hidden), joined, expert, rows=(0, width))
    yield Place(f"{published}.up_proj.weight", (width, hidden), joined, expert, rows=(width, 2 * width))
    yield Place(f"{published}.down_proj.weight", (hidden, width), f"{own}.down_proj", expert)
