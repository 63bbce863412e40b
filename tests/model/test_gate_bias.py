"""The gate bias stays fp32 and exact through everything a model goes through: in bf16 other experts would be chosen."""

import copy

import pytest
import torch
from torch import nn

from fireflyer.model.decoder import Decoder
from fireflyer.model.routing import route

NEAR = [0.5 + n * 2.0**-14 for n in range(16)]
"""In bf16 all of these are one number, 0.5."""


@pytest.fixture
def model(tiny):
    """Every gate's bias ranks the experts upwards, by differences that bf16 drops; the gate itself says nothing."""
    model = tiny("v3", n_group=1, topk_group=1, num_nextn_predict_layers=1)
    for _, gate in model.gates():
        gate.weight.data.zero_()
        gate.e_score_correction_bias.copy_(torch.tensor(NEAR))
    return model


def chosen(model):
    ids = torch.arange(8)[None]
    return [routing.indices_NK[0].tolist() for routing in model.trunk(ids).routing]


TOP = [[15, 14, 13, 12]] * 3


def cast_back(model):
    return model.to(torch.bfloat16).half().float()


def saved_and_loaded(model):
    other = Decoder(model.config).to(torch.bfloat16)
    other.load_state_dict(model.to(torch.bfloat16).state_dict())
    return other


def loaded_from_meta(model):
    with torch.device("meta"):
        other = Decoder(model.config)
    other = other.to(torch.bfloat16).to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize(
    "journey",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.double().bfloat16(),
        lambda model: nn.Sequential(model).to(torch.bfloat16)[0],
        lambda model: copy.deepcopy(model.to(torch.bfloat16)),
        lambda model: copy.deepcopy(model).to(torch.bfloat16),
        cast_back,
        saved_and_loaded,
        loaded_from_meta,
    ],
)
def test_near_ties_route_alike_after(journey, model):
    assert chosen(model) == TOP
    travelled = journey(model)
    for _, bias in travelled.gate_biases():
        assert bias.dtype == torch.float32
        assert bias.tolist() == NEAR
    if travelled.model.norm.weight.dtype != torch.float64:
        assert chosen(travelled) == TOP


def test_the_control_bf16_would_choose_others(model):
    rounded = torch.tensor(NEAR).bfloat16().float()
    assert route(torch.zeros(1, 16), rounded, model.config)[0].tolist() == [[0, 1, 2, 3]]


def test_to_meta_and_back_is_fp32(model):
    empty = model.to("meta").to(torch.bfloat16).to_empty(device="cpu")
    assert all(bias.dtype == torch.float32 and bias.device.type == "cpu" for _, bias in empty.gate_biases())


def test_the_bias_is_a_buffer_that_is_saved_and_no_parameter(model):
    assert not any("e_score_correction_bias" in name for name, _ in model.named_parameters())
    saved = [name for name in model.state_dict() if "e_score_correction_bias" in name]
    assert saved == [
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.mtp.0.block.mlp.gate.e_score_correction_bias",
    ]
    assert [index for index, _ in model.gate_biases()] == [1, 2, 3]


def test_gate_biases_are_the_live_buffers(model):
    """What balancing updates in place is what routing reads."""
    for _, bias in model.gate_biases():
        bias[3] += 1
    assert [row[0] for row in chosen(model)] == [3, 3, 3]


def test_no_gradient_reaches_the_bias(model):
    out = model(torch.arange(8)[None])
    out.logits.sum().backward()
    assert all(bias.grad is None and not bias.requires_grad for _, bias in model.gate_biases())


@pytest.mark.parametrize("kind", ["v2", "v2-lite"])
def test_v2_has_no_bias(kind, tiny):
    model = tiny(kind)
    assert model.gate_biases() == []
    assert len(model.gates()) == 2
    assert not any("bias" in name for name in model.state_dict())
