"""The routed experts: dispatch, products and combination against a dense loop over tokens and experts."""

import pytest
import torch
import torch.nn.functional as F

from fireflyer.model import experts as experts_module
from fireflyer.model.experts import Experts, grouped_linear


def make(tiny, seed=0, **changes):
    """The experts of a tiny layer, at the sizes asked for."""
    config = tiny("v3").config.replace(**changes)
    layer = Experts(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return layer


def dense(x_ND, indices_NK, weights_NK, gate_up_proj, down_proj):
    """Σ weight · expert(x), one token and one expert at a time."""
    rows = []
    for n, x in enumerate(x_ND):
        total = torch.zeros_like(x)
        for k, expert in enumerate(indices_NK[n].tolist()):
            gate, up = (gate_up_proj[expert] @ x).chunk(2)
            total = total + weights_NK[n, k] * (down_proj[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def inputs(tokens, hidden, experts, per_token, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    indices = torch.stack([torch.randperm(experts, generator=generator)[:per_token] for _ in range(tokens)])
    return x.requires_grad_(), indices, torch.rand(tokens, per_token, generator=generator).requires_grad_()


SHAPES = {
    "even": {},
    "few rows, fewer than experts": {"tokens": 2},
    "one token": {"tokens": 1},
    "one expert a token": {"num_experts_per_tok": 1},
    "widths off 16 bytes": {"hidden_size": 42, "moe_intermediate_size": 15},
    "one width off 16 bytes": {"moe_intermediate_size": 14},
}


@pytest.mark.parametrize("name", SHAPES)
def test_experts_equal_a_dense_loop_in_output_and_every_gradient(name, tiny):
    changes = dict(SHAPES[name])
    tokens = changes.pop("tokens", 40)
    layer = make(tiny, **changes)
    hidden = layer.gate_up_proj.shape[2]
    per_token = changes.get("num_experts_per_tok", 4)
    x, indices, weights = inputs(tokens, hidden, 16, per_token)
    grad = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2))

    out = layer(x, indices, weights)
    actual = torch.autograd.grad(out, [x, weights, *layer.parameters()], grad)
    expected_out = dense(x, indices, weights, layer.gate_up_proj, layer.down_proj)
    expected = torch.autograd.grad(expected_out, [x, weights, *layer.parameters()], grad)
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_an_expert_without_a_token_gets_zero_gradient(tiny):
    layer = make(tiny)
    x, _, weights = inputs(20, 48, 16, 2)
    indices = torch.tensor([[1, 14]] * 20)
    out = layer(x, indices, weights)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(
        out, dense(x, indices, weights, layer.gate_up_proj, layer.down_proj), rtol=1e-5, atol=1e-5
    )
    for parameter in layer.parameters():
        assert parameter.grad is not None
        used = parameter.grad.abs().amax((1, 2)) > 0
        assert used.nonzero().flatten().tolist() == [1, 14]


def test_all_tokens_to_one_expert(tiny):
    layer = make(tiny)
    x, _, weights = inputs(20, 48, 16, 1)
    indices = torch.full((20, 1), 15)
    out = layer(x, indices, weights)
    torch.testing.assert_close(
        out, dense(x, indices, weights, layer.gate_up_proj, layer.down_proj), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_and_the_loop_agree(dtype, monkeypatch):
    """`grouped_linear` with torch's grouped product and with the loop that stands in for it; experts 0 and 3 idle."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(5, 24, 16, generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor([0, 7, 20, 20, 30], dtype=torch.int32)
    grad = torch.randn(30, 24, generator=generator).to(dtype)
    assert experts_module._has_grouped_mm(x, weight)
    one_call = grouped_linear(x, weight, ends)
    gradients = torch.autograd.grad(one_call, [x, weight], grad)
    monkeypatch.setattr(experts_module, "_has_grouped_mm", lambda *_: False)
    loop = grouped_linear(x, weight, ends)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(one_call, loop, **close)
    for a, e in zip(gradients, torch.autograd.grad(loop, [x, weight], grad), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, e, **close)


def test_the_fallback_is_taken_where_rows_are_not_16_bytes():
    def has(dtype, *shape):
        return experts_module._has_grouped_mm(torch.zeros(64, shape[-1], dtype=dtype), torch.zeros(shape, dtype=dtype))

    assert has(torch.float32, 4, 8, 12)
    assert not has(torch.float32, 4, 8, 14)
    assert not has(torch.float32, 4, 6, 12)
    assert has(torch.bfloat16, 4, 8, 16)
    assert not has(torch.bfloat16, 4, 8, 12)


def test_no_row_gives_no_row():
    ends = torch.zeros(3, dtype=torch.int32)
    assert grouped_linear(torch.zeros(0, 8), torch.zeros(3, 5, 8), ends).shape == (0, 5)


@pytest.mark.parametrize("kind", ["v2", "v3", "moonlight"])
def test_a_layer_adds_the_shared_experts_ungated(kind, tiny):
    """The whole layer against its parts: the gate's choice, the dense loop, and the shared feed-forward once."""
    model = tiny(kind)
    layer = model.model.layers[1].mlp
    x_BTD = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y_BTD, routing = layer(x_BTD)
        x_ND = x_BTD.flatten(0, 1)
        scores = routing.scores_NE.gather(1, routing.indices_NK)
        weights = scores / scores.sum(-1, keepdim=True) if kind != "v2" else scores
        weights = weights * {"v2": 16.0, "v3": 2.5, "moonlight": 2.446}[kind]
        routed = dense(x_ND, routing.indices_NK, weights, layer.experts.gate_up_proj, layer.experts.down_proj)
        gate, up = (x_ND @ layer.shared_experts.gate_up_proj.weight.T).chunk(2, dim=-1)
        expected = routed + (F.silu(gate) * up) @ layer.shared_experts.down_proj.weight.T
    torch.testing.assert_close(y_BTD.flatten(0, 1), expected, rtol=1e-5, atol=2e-5)
    assert routing.layer_index == 1
    assert routing.shape_BT == (2, 9)
    torch.testing.assert_close(
        routing.scores_NE,
        (x_ND @ layer.gate.weight.T).softmax(-1) if kind == "v2" else (x_ND @ layer.gate.weight.T).sigmoid(),
    )


def test_a_layer_without_shared_experts(tiny, ids):
    model = tiny("v3", n_shared_experts=0)
    assert not any("shared" in name for name in model.state_dict())
    assert model(ids(1, 5)).logits.isfinite().all()


def test_autocast_lowers_the_experts_and_spares_the_gate(tiny):
    """torch's list of lowered operations lacks grouped_mm: the experts lower their own; gradients stay fp32."""
    layer = tiny("v3").model.layers[1].mlp
    x = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(0))
    ends = torch.arange(1, 17, dtype=torch.int32) * 3
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x[0], layer.experts.gate_up_proj, ends.clamp(max=30)).dtype == torch.bfloat16
        y, routing = layer(x)
    exact, exact_routing = layer(x)
    assert routing.scores_NE.dtype == torch.float32
    assert torch.equal(routing.indices_NK, exact_routing.indices_NK)
    assert 0 < (y.detach() - exact.detach()).std() < 0.02 * exact.detach().std()
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.experts.parameters())
