"""One decoder layer: attention and feed-forward, each behind its norm and around a residual."""

from __future__ import annotations

from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.model.attention import AttentionInputs, LatentAttention
from fireflyer.model.experts import MoE, Routing
from fireflyer.model.norm import RMSNorm, SwiGLU


class Block(nn.Module):
    """Layer `layer_index`: dense where the index is below `first_k_dense_replace`, DeepSeekMoE otherwise."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU = (
            MoE(config, layer_index)
            if config.is_moe(layer_index)
            else SwiGLU(config.hidden_size, config.intermediate_size)
        )

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Routing | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), inputs, self.layer_index)
        normed_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, MoE):
            y_BTD, routing = self.mlp(normed_BTD, inputs.tiles, inputs.forced_experts.get(self.layer_index))
            return x_BTD + y_BTD, routing
        return x_BTD + self.mlp(normed_BTD, inputs.tiles), None
