"""Multi-token prediction (report 2.2): the hidden state of token i and the embedding of token i+k predict token i+k+1.

Depth k takes the *normed* hidden state of the depth before it (depth 0 is the main model after its last norm). The
projection's input is [embedding ; hidden], the order of the released weights and the reverse of the report's eq. 21.
A row keeps the position (and the cache slot, and the document) of its token i: rotary attention sees differences only.
Embedding and head are the main model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.model.attention import AttentionInputs
from fireflyer.model.block import Block
from fireflyer.model.experts import Routing
from fireflyer.model.norm import RMSNorm
from fireflyer.model.row_tiles import linear


class MTPModule(nn.Module):
    """Depth `depth` (from 0); published as layer `num_hidden_layers + depth`."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, config.num_hidden_layers + depth)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_BTD: Tensor, embeds_BTD: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Routing | None]:
        """`hidden_BTD` of tokens i and `embeds_BTD` of tokens i+k, both (B, T-k, D); the hidden states after `norm`."""
        joined = torch.cat((self.enorm(embeds_BTD), self.hnorm(hidden_BTD)), dim=-1)
        x_BTD, routing = self.block(linear(self.eh_proj, joined, inputs.tiles), inputs)
        return self.norm(x_BTD), routing
