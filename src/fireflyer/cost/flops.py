"""Floating-point operations of training, per token: arithmetic, no torch.

Each parameter that takes part costs 2 operations forward and 4 backward; causal attention adds its scores and sums over
half the sequence. At V3's sizes and 4,096 tokens that is 250.5 GFLOP (arXiv 2505.09343 has 250). Recomputation isn't
counted, so a utilisation from these figures is one of the model's work.
"""

from __future__ import annotations

from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import count_parameters


def training_flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """Forward and backward of the main model for one token of a causal sequence of `seq_len` tokens."""
    attention = config.num_hidden_layers * _attention_flops_per_token(config, seq_len)
    return 6 * count_parameters(config).active + attention


def mtp_training_flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """What the MTP modules add to it, their use of the shared head included."""
    attention = config.num_nextn_predict_layers * _attention_flops_per_token(config, seq_len)
    return 6 * count_parameters(config).mtp_active + attention


def _attention_flops_per_token(config: ModelConfig, seq_len: float) -> float:
    """Scores and weighted values of one layer, forward and backward, over seq_len / 2 keys on average."""
    multiply_adds = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * seq_len / 2
    return 6 * multiply_adds
