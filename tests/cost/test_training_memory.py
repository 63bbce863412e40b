"""The bytes of training, against what autograd keeps of the real decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fireflyer.config import ModelConfig, load_config
from fireflyer.cost.parameters import count_parameters
from fireflyer.cost.training_memory import PROCESS, layer_bytes_per_token, training_memory
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.train.losses import training_losses

_SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "first_k_dense_replace": 1, "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1,
    "topk_group": 1, "quantization_config": None,
}  # fmt: skip


def config(**changes: Any) -> ModelConfig:
    return load_config("deepseek-v3").replace(**(_SMALL | changes))


def kept_bytes(model: Decoder, rows: int, tokens: int) -> int:
    """Of all memory, parameters apart, that the graph of a loss holds on to."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            seen[address] = tensor  # held, so that no address comes twice
        return tensor

    ids = torch.randint(model.config.vocab_size, (rows, tokens))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = training_losses(
            model.trunk(ids), model.head_weight, ids, None,
            num_experts_per_tok=model.config.num_experts_per_tok, valid_in_batch=ids.numel(), rows_in_batch=rows,
        )  # fmt: skip
        total = terms.total(0.3, 1e-4)
    assert total.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"q_lora_rank": None, "v_head_dim": 24, "num_nextn_predict_layers": 1},
        {"n_shared_experts": 2, "n_routed_experts": 16, "num_experts_per_tok": 5, "first_k_dense_replace": 2},
    ],
)
def test_activations_are_what_autograd_keeps(changes: dict[str, Any]) -> None:
    model = Decoder(config(**changes))
    init_weights_(model, torch.Generator().manual_seed(0))
    for rows, tokens in ((4, 48), (2, 160)):
        expected = kept_bytes(model, rows, tokens)
        said = training_memory(model.config, rows=rows, seq_len=tokens).activations
        assert said == pytest.approx(expected, rel=0.03)


def test_state_by_its_parts() -> None:
    shape = config()
    counts = count_parameters(shape)
    weights = 4 * (counts.total + counts.mtp)
    found = training_memory(shape, rows=2, seq_len=64, average=True)
    assert (found.weights, found.gradients, found.moments, found.average, found.saving) == (
        weights, weights, 2 * weights, weights, 4 * weights,
    )  # fmt: skip
    alone = training_memory(shape, rows=2, seq_len=64)
    assert alone.total == PROCESS + 6 * weights + max(weights, alone.activations + alone.working)
    several = training_memory(shape, rows=2, seq_len=64, micro_batches=3)
    assert several.total == PROCESS + 7 * weights + several.activations + several.working


def test_recomputing_keeps_little() -> None:
    deep = config(num_hidden_layers=24)
    full = training_memory(deep, rows=8, seq_len=512).activations
    assert training_memory(deep, rows=8, seq_len=512, recompute=True).activations < 0.3 * full


def test_bf16_halves_the_operands_alone() -> None:
    shape = config()
    for moe in (False, True):
        wide, narrow = (layer_bytes_per_token(shape, moe=moe, bytes_per_operand=number) for number in (4, 2))
        assert 0.5 < narrow / wide < 0.75
