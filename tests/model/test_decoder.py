"""The decoder as a whole: published sizes, inputs, refusals, initial weights."""

import time

import pytest
import torch

from fireflyer.config import load_config
from fireflyer.model.cache import ContiguousCache
from fireflyer.model.decoder import Decoder, compile_trunk, init_weights_


@pytest.mark.parametrize(
    ("preset", "main", "mtp"),
    [
        ("deepseek-v2-lite", 15_706_484_224, 0),
        ("deepseek-v2", 235_741_434_880, 0),
        ("deepseek-v3", 671_026_419_200, 11_610_068_224),
        ("moonlight", 15_960_110_208, 0),
        ("kimi-k2", 1_026_408_232_448, 0),
    ],
)
def test_the_published_models_have_the_published_sizes(preset, main, mtp):
    """Built on the meta device within seconds; gate biases counted, the MTP module without copies of its neighbours."""
    start = time.monotonic()
    with torch.device("meta"):
        model = Decoder(load_config(preset))
    assert time.monotonic() - start < 30
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(tensor.is_meta for tensor in tensors.values())
    counts = {"main": 0, "mtp": 0}
    for name, tensor in tensors.items():
        counts["mtp" if name.startswith("model.mtp.") else "main"] += tensor.numel()
    assert counts == {"main": main, "mtp": mtp}


@pytest.mark.parametrize("recompute", [False, True])
def test_embeddings_may_be_given_instead_of_ids(recompute, tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=2)
    embeds = model.model.embed_tokens(ids(2, 20))
    by_ids = model.trunk(ids(2, 20), recompute=recompute)
    by_embeds = model.trunk(inputs_embeds=embeds, recompute=recompute)
    assert torch.equal(by_ids.hidden_BTD, by_embeds.hidden_BTD)
    assert all(torch.equal(a, b) for a, b in zip(by_ids.mtp_hidden, by_embeds.mtp_hidden, strict=True))
    assert torch.equal(model(ids(2, 20)).logits, model(inputs_embeds=embeds).logits)


def test_forward_is_the_trunk_and_the_head(tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=2)
    with torch.no_grad():
        out, trunk = model(ids(2, 20)), model.trunk(ids(2, 20))
        assert torch.equal(out.logits, trunk.hidden_BTD @ model.lm_head.weight.T)
        for logits, hidden in zip(out.mtp_logits, trunk.mtp_hidden, strict=True):
            assert torch.equal(logits, model.head(hidden))


def test_what_cannot_be_done_is_refused(tiny, ids):
    model = tiny("v3")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model.trunk(ids(1, 4), inputs_embeds=torch.zeros(1, 4, 48))
    with pytest.raises(ValueError, match="document_ids can't be combined with a cache"):
        model(ids(1, 4), document_ids=torch.zeros(1, 4), cache=ContiguousCache(model.config, 1, 8))


def test_dense_layers_come_first(tiny):
    model = tiny("v3", num_hidden_layers=4, first_k_dense_replace=2, num_nextn_predict_layers=1)
    assert [index for index, _ in model.gates()] == [2, 3, 4]
    assert model.model.layers[1].mlp.gate_up_proj.weight.shape == (128, 48)
    assert model.model.layers[2].mlp.experts.gate_up_proj.shape == (16, 32, 48)


def test_routing_is_listed_per_sparse_layer_main_ones_first(tiny, ids):
    out = tiny("v3", num_nextn_predict_layers=2).trunk(ids(3, 10))
    assert [(r.layer_index, r.shape_BT) for r in out.routing] == [(1, (3, 10)), (2, (3, 10)), (3, (3, 9)), (4, (3, 8))]
    for routing in out.routing:
        rows = routing.shape_BT[0] * routing.shape_BT[1]
        assert routing.scores_NE.shape == (rows, 16)
        assert routing.scores_NE.requires_grad
        assert routing.scores_NE.dtype == torch.float32
        assert routing.indices_NK.shape == (rows, 4)


def test_initial_weights(tiny):
    """Normal of the given width for matrices, embedding and gate, ones for norms, zeros for gate biases."""
    config = tiny("v3", num_nextn_predict_layers=1).config.replace(initializer_range=0.006)
    model = Decoder(config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    for _, bias in model.gate_biases():
        bias.fill_(float("nan"))
    init_weights_(model, torch.Generator().manual_seed(0))
    norms = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            norms += 1
            assert (parameter == 1).all(), name
        else:
            n = parameter.numel()
            assert abs(float(parameter.detach().mean())) < 5 * 0.006 / n**0.5, name
            assert float(parameter.detach().std()) == pytest.approx(0.006, rel=4 / n**0.5), name
    assert norms == 3 * 4 + 1 + 4 + 3
    assert all((bias == 0).all() for _, bias in model.gate_biases())


def test_initial_weights_depend_on_the_generator_alone(tiny):
    config = tiny("v3", num_nextn_predict_layers=1).config

    def weights(seed, noise):
        torch.manual_seed(noise)
        model = Decoder(config)
        init_weights_(model, torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other = weights(1, 0), weights(1, 99), weights(2, 0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    layers = [first[f"model.layers.{i}.self_attn.o_proj.weight"] for i in range(2)]
    assert not torch.equal(*layers)


def test_a_dense_decoder_has_no_routing(tiny, ids):
    model = tiny("v3", n_routed_experts=0, num_nextn_predict_layers=1)
    out = model.trunk(ids(2, 10))
    assert out.routing == []
    assert model.gates() == []


def test_the_compiler_takes_the_trunk(tiny, ids, monkeypatch):
    """The tracer alone, without generating code: the experts' uneven products, which it can't follow, run as ever."""
    model = tiny("v3", num_hidden_layers=1, first_k_dense_replace=0)
    expected = model.trunk(ids(2, 12)).hidden_BTD
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    out = compile_trunk(model)(ids(2, 12))
    torch.testing.assert_close(out.hidden_BTD, expected, rtol=1e-5, atol=1e-5)  # rotations are rounded another way
    out.hidden_BTD.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "lm_head.weight")


def test_recorded_experts_forced_on_other_weights_are_taken_in_every_layer(tiny, ids):
    """Replay: the experts of one pass in another, whose gates would choose otherwise."""
    model = tiny("v3", num_nextn_predict_layers=1)
    recorded = model.trunk(ids(2, 20))
    experts = {routing.layer_index: routing.indices_NK for routing in recorded.routing[:-1]}
    again = model.trunk(ids(2, 20), forced_experts=experts)
    torch.testing.assert_close(again.hidden_BTD, recorded.hidden_BTD)
    with torch.no_grad():
        for _, gate in model.gates():
            gate.weight.neg_()
    own, forced = model.trunk(ids(2, 20)), model.trunk(ids(2, 20), forced_experts=experts)
    for index, layer in enumerate(forced.routing[:-1]):
        assert torch.equal(layer.indices_NK, experts[layer.layer_index])
        assert not torch.equal(own.routing[index].indices_NK, layer.indices_NK)
    assert forced.routing[-1].layer_index == model.config.num_hidden_layers  # the MTP layer chose for itself


def test_in_fp64_nothing_is_rounded_to_fp32(tiny, ids):
    """The slope by finite differences has four digits only where all between is exact to ten."""
    model = tiny("v3", num_nextn_predict_layers=1).double()
    embeds = model.model.embed_tokens(ids(1, 12)).detach().requires_grad_()

    def total(inputs):
        out = model(inputs_embeds=inputs)
        return out.logits.sin().sum() + out.mtp_logits[0].sin().sum()

    (gradient,) = torch.autograd.grad(total(embeds), embeds)
    step = 1e-6 * torch.randn(embeds.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slope = (total(embeds + step) - total(embeds - step)) / 2
    assert slope.item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)
