"""ModelConfig: the published config.json, in and out, checked.

In: a config.json of DeepSeek-V2, V2-Lite, V3/R1/V3.1, Moonlight or Kimi-K2 (the old `rope_scaling` or the new
`rope_parameters` spelling), the [model] table of a recipe, or a shipped preset's name. Out: one frozen ModelConfig, and
back again the published dictionary. Whatever would change the arithmetic and isn't implemented is refused by name.
V3 report, sections 2.1 and 4.2; the defaults of absent keys are those of transformers 5.24.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from fireflyer.config.files import find_config, read_json, read_toml
from fireflyer.config.messages import shown, validation_message
from fireflyer.config.published import PACKED, from_published, to_published
from fireflyer.errors import UserError

LATENT_NORM_EPS = 1e-6
"""eps of the norms of the query and key-value latents: the published code ignores `rms_norm_eps` there."""

Size = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class RopeScaling(BaseModel):
    """YaRN's settings (arXiv 2309.00071), under the names of config.json's `rope_scaling`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    factor: Annotated[float, Field(ge=1)]
    original_max_position_embeddings: Size
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    mscale: Positive = 1.0
    mscale_all_dim: NotNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} is below beta_slow {self.beta_slow:g}; swap them")
        if self.mscale_all_dim == 0 and self.mscale != 1:
            raise ValueError(
                f"mscale {self.mscale:g} without mscale_all_dim means different things to different readers;"
                " give both (the released models have them equal)"
            )
        return self


class ModelConfig(BaseModel):
    """The shape of one model, under the published names. Build it with `from_dict`, `from_file` or `load_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    model_type: str = "deepseek_v3"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    num_hidden_layers: Size
    first_k_dense_replace: Count
    num_attention_heads: Size
    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    n_routed_experts: Count
    n_shared_experts: Count
    num_experts_per_tok: Count
    n_group: Size = 1
    topk_group: Size = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Size
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: Count = 0
    initializer_range: Positive = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    quantization_config: dict[str, Any] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: the part without positions and the rotated part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the key-value latent and the shared rope key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def is_packed(self) -> bool:
        """Whether the folder of this config holds weights packed as integers, which run but can't be trained."""
        return (self.quantization_config or {}).get("quant_method") == PACKED

    @property
    def num_layers_with_mtp(self) -> int:
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe(self, layer_index: int) -> bool:
        """Whether the layer has routed experts; the MTP layer of depth d is `num_hidden_layers + d`, d from 0."""
        return self.n_routed_experts > 0 and layer_index >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, published: dict[str, Any], source: str = "config") -> Self:
        """The config of a published dictionary; `source` names it in errors. Raises UserError."""
        return cls._checked(from_published(published, cls.model_fields, source), source)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The config of a config.json, or of the folder that holds one. Raises UserError."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        return cls.from_dict(read_json(path), source=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The published config.json; `from_dict` reads it back equal, and transformers 5.24 loads it unchanged."""
        return to_published(self.model_dump())

    def replace(self, **changes: Any) -> Self:
        """A copy with fields changed, checked again. Raises UserError."""
        return self._checked({**dict(self), **changes}, "changed config")

    @classmethod
    def _checked(cls, fields: dict[str, Any], source: str) -> Self:
        scaling = fields.get("rope_scaling")
        try:
            if isinstance(scaling, dict):
                scaling = RopeScaling.model_validate(scaling)
        except ValidationError as error:
            raise UserError(validation_message(error, f"{source}: rope_scaling", RopeScaling.model_fields)) from None
        try:
            return cls.model_validate({**fields, "rope_scaling": scaling})
        except ValidationError as error:
            raise UserError(validation_message(error, source, cls.model_fields)) from None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim {self.qk_rope_head_dim} is odd, and rotary positions turn pairs; make it even"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace {self.first_k_dense_replace} is above num_hidden_layers"
                f" {self.num_hidden_layers}; give 0 to {self.num_hidden_layers}"
            )
        if self.n_routed_experts:
            _check_routing(self)
        return self


def _check_routing(config: ModelConfig) -> None:
    experts, chosen, groups = config.n_routed_experts, config.num_experts_per_tok, config.n_group
    _check_scoring(config)
    if not 1 <= chosen <= experts:
        raise ValueError(f"num_experts_per_tok {chosen} isn't within 1 and n_routed_experts {experts}; lower it")
    if experts % groups:
        raise ValueError(f"n_group {groups} doesn't divide n_routed_experts {experts}; choose groups of equal size")
    if config.topk_group > groups:
        raise ValueError(f"topk_group {config.topk_group} is above n_group {groups}; lower it")
    if config.topk_method == "greedy":
        return
    if config.topk_method == "noaux_tc" and experts // groups < 2:
        raise ValueError(
            f"n_group {groups} leaves {experts // groups} expert a group, and a group's score is the sum of its best"
            " two; use fewer groups"
        )
    reachable = experts // groups * config.topk_group
    if chosen > reachable:
        raise ValueError(
            f"num_experts_per_tok {chosen} is above the {reachable} experts of topk_group {config.topk_group} open"
            f" groups of {experts // groups}; open more groups or choose fewer experts"
        )


_METHODS = {"softmax": ("greedy", "group_limited_greedy"), "sigmoid": ("noaux_tc",)}


def _check_scoring(config: ModelConfig) -> None:
    scoring, method = config.scoring_func, config.topk_method
    expected = "softmax" if config.model_type == "deepseek_v2" else "sigmoid"
    if scoring not in _METHODS:
        raise ValueError(f"scoring_func {shown(scoring)} is unknown; DeepSeek's models use softmax (V2), sigmoid (V3)")
    if scoring != expected:
        raise ValueError(f"scoring_func {scoring} doesn't go with model_type {config.model_type}; it has {expected}")
    if method not in _METHODS[scoring]:
        right = " or ".join(_METHODS[scoring])
        raise ValueError(f"topk_method {shown(method)} doesn't go with scoring_func {scoring}; it has {right}")
    if scoring == "softmax" and config.norm_topk_prob:
        raise ValueError(
            "norm_topk_prob true with scoring_func softmax means different things to different readers (scaled or not);"
            " the released V2 models have false"
        )


def load_config(name_or_path: str | Path) -> ModelConfig:
    """The config of a checkpoint or run folder, a config.json, a recipe (its [model] table) or a preset.

    Raises UserError.
    """
    path = find_config(name_or_path)
    if path.suffix != ".toml":
        return ModelConfig.from_file(path)
    table = read_toml(path).get("model")
    if not isinstance(table, dict):
        raise UserError(f"{path}: no [model] table, which describes the model; add one")
    return ModelConfig.from_dict(table, source=f"{path} [model]")
