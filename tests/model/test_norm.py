"""RMSNorm and SwiGLU: forward and backward against the composed forms, whose autograd is the oracle."""

import pytest
import torch
import torch.nn.functional as F

from fireflyer.model.norm import RMSNorm, SwiGLU, swiglu, weighted_swiglu


def plain_norm(x, weight, eps):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def plain_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def outcome(function, *inputs):
    """Output and gradients for a fixed, uneven gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def check(actual, expected, dtype):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype == dtype
        worst = (a.double() - e.double()).abs().max() / e.double().abs().max()
        assert worst < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 24), (1, 1, 7)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_equals_the_composed_form(dtype, shape, eps):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = (torch.rand(shape[-1], generator=generator) + 0.5).to(dtype)
    norm = RMSNorm(shape[-1], eps)
    norm.weight.data = weight

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    check(outcome(ours, x, weight), outcome(lambda x, w: plain_norm(x, w, eps), x, weight), dtype)


def test_norm_by_hand():
    """Mean square (9 + 16 + 0 + 0) / 4 = 6.25, root 2.5."""
    norm = RMSNorm(4, 0.0)
    norm.weight.data = torch.tensor([1.0, 10.0, 1.0, 1.0])
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]])), torch.tensor([[1.2, 16.0, 0.0, 0.0]]))


def test_norm_of_bf16_is_taken_in_fp32():
    """Rounded once, at the end: nearly every number is the bf16 nearest to the float64 result."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert (RMSNorm(256, 1e-6).bfloat16()(x) != exact.bfloat16()).double().mean() < 1e-3


def test_norm_of_zeros_is_zero_with_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    out = RMSNorm(8, 1e-6)(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_a_second_derivative_of_the_norm_is_refused():
    x = torch.ones(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(RMSNorm(4, 1e-6)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 8)])
def test_swiglu_equals_the_composed_form(dtype, shape):
    gate_up = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    check(outcome(swiglu, gate_up), outcome(plain_swiglu, gate_up), dtype)


def test_swiglu_gradient_in_float64():
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(swiglu, gate_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_swiglu_equals_the_composed_form(dtype):
    generator = torch.Generator().manual_seed(0)
    gate_up, weight, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 16), (5,), (5, 8)))
    results = []
    for form in (weighted_swiglu, lambda x, w: plain_swiglu(x) * w[:, None]):
        inputs = [tensor.clone().requires_grad_() for tensor in (gate_up, weight)]
        out = form(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
        with torch.no_grad():
            assert torch.equal(form(*inputs), out)
    for own, composed in zip(*results, strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.06
        torch.testing.assert_close(own, composed, rtol=tolerance, atol=tolerance)


def test_weighted_swiglu_gradient_in_float64():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_() for n in ((3, 8), (3,))]
    assert torch.autograd.gradcheck(weighted_swiglu, inputs)


def test_swiglu_takes_inputs_and_gradients_that_are_not_contiguous():
    wide = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    twin = wide.detach().clone().requires_grad_()
    swiglu(wide).sum().backward()  # the sum's gradient has stride 0
    plain_swiglu(twin).sum().backward()
    torch.testing.assert_close(wide.grad, twin.grad)


def test_gate_rows_come_first_in_the_feed_forward():
    """gate_up_proj is [gate; up]: a large gate lets `up` through, a very negative one nothing."""
    layer = SwiGLU(1, 1)
    layer.down_proj.weight.data.fill_(1.0)
    layer.gate_up_proj.weight.data = torch.tensor([[50.0], [3.0]])
    with torch.no_grad():
        assert float(layer(torch.ones(1, 1))) == pytest.approx(150.0)
        assert float(layer(-torch.ones(1, 1))) == pytest.approx(0.0, abs=1e-6)
