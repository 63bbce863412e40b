"""Ordinary multi-head attention in MLA's place, for the ablation: every head has its own keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.model.attention import AttentionInputs


class MultiHeadAttention(nn.Module):
    """Heads as wide as makes the parameters those of `LatentAttention`; half of each head is rotated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.rope = config.qk_rope_head_dim
        self.width = head_width(config)
        rows = self.num_heads * self.width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.hidden_size, rows, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(rows, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs, layer_index: int) -> Tensor:
        q, k, v = (
            projection(x_BTD).unflatten(-1, (self.num_heads, self.width))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (self._turned(part, inputs).transpose(1, 2) for part in (q, k))
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _turned(self, x_BTHW: Tensor, inputs: AttentionInputs) -> Tensor:
        turned, plain = x_BTHW.split((self.rope, self.width - self.rope), dim=-1)
        return F.pad(plain, (self.rope, 0)) + F.pad(inputs.turn(turned, heads=True), (0, self.width - self.rope))


def head_width(config: ModelConfig) -> int:
    """Such that 4 x hidden x heads x width is nearest to MLA's matrices."""
    heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.q_lora_rank or 0
    queries = rank * (hidden + heads * config.qk_head_dim) if rank else hidden * heads * config.qk_head_dim
    keys = hidden * config.latent_dim + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return round((queries + keys + heads * config.v_head_dim * hidden) / (4 * hidden * heads))
