"""A decoder in FP8: its layers against products of operands rounded by hand, and what its graph keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.model.attention import AttentionInputs
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.model.experts import Experts
from fireflyer.model.fp8_layers import Fp8Attention, Fp8Experts, Fp8Linear, Fp8SwiGLU, _Core, use_fp8
from fireflyer.model.norm import SwiGLU
from fireflyer.numerics.fp8_tiles import (
    BLOCK,
    COLUMN_TILE,
    ROW_TILE,
    Tile,
    dequantize_tiles,
    pack_e5m6,
    quantize_tiles,
    unpack_e5m6,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64,
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
    "max_position_embeddings": 256, "num_nextn_predict_layers": 1, "initializer_range": 0.05,
}  # fmt: skip


def decoder(**changed: Any) -> Decoder:
    model = Decoder(ModelConfig.from_dict({**SHAPE, **changed}))
    init_weights_(model, torch.Generator().manual_seed(0))
    return model


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, tile: Tile, power_of_two: bool = False) -> Tensor:
    return dequantize_tiles(quantize_tiles(x, tile, power_of_two=power_of_two))


def close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_what_stays_high_and_what_does_not():
    model = decoder()
    before = dict(model.named_parameters())
    use_fp8(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {
        n: id(p) for n, p in before.items()
    }
    narrow = {name for name, module in model.named_modules() if isinstance(module, (Fp8Linear, Fp8Experts))}
    for block in ("model.layers.0", "model.layers.1", "model.mtp.0.block"):
        projections = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
        expected = {f"{block}.self_attn.{name}" for name in projections}
        feed_forward = "mlp" if block == "model.layers.0" else "mlp.shared_experts"
        expected |= {f"{block}.{feed_forward}.{name}" for name in ("gate_up_proj", "down_proj")}
        expected |= set() if block == "model.layers.0" else {f"{block}.mlp.experts"}
        assert {name for name in narrow if name.startswith(f"{block}.")} == expected
        narrow -= expected
    assert not narrow
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.mtp[0].eh_proj) is nn.Linear


def test_without_gradients_the_weights_themselves_speak():
    model, ids = decoder(), torch.arange(40).view(2, 20)
    narrow = copy.deepcopy(model)
    use_fp8(narrow)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, narrow(ids).logits)
    assert not torch.equal(model(ids).logits, narrow(ids).logits)


def test_a_linear_layer_and_its_gradients():
    layer = Fp8Linear(160, 200, bias=False)
    x, grad = drawn(3, 50, 160).requires_grad_(), drawn(3, 50, 200, seed=2)
    y = layer(x)
    y.backward(grad)
    rows, weight, g = x.detach().flatten(0, 1), layer.weight.detach(), grad.flatten(0, 1)
    close(y.flatten(0, 1), rounded(rows, ROW_TILE) @ rounded(weight, BLOCK).T)
    assert x.grad is not None
    close(x.grad.flatten(0, 1), rounded(g, ROW_TILE) @ rounded(weight, BLOCK))
    close(layer.weight.grad, rounded(g, COLUMN_TILE).T @ rounded(rows, COLUMN_TILE))


def test_after_attention_the_input_is_kept_in_twelve_bits():
    layer = Fp8Linear(160, 200, bias=False)
    x, grad = drawn(50, 160).requires_grad_(), drawn(50, 200, seed=2)
    kept = pack_e5m6(x.detach())
    y = layer(x, (kept.packed, kept.exponents))
    y.backward(grad)
    close(y, rounded(x.detach(), ROW_TILE, True) @ rounded(layer.weight.detach(), BLOCK).T)
    columns = rounded(unpack_e5m6(kept), COLUMN_TILE, True)
    close(layer.weight.grad, rounded(grad, COLUMN_TILE).T @ columns)


def swiglu_by_hand(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * (1.0 if weight is None else weight[:, None])


def test_a_feed_forward_computes_swiglu_again_from_fp8():
    layer = SwiGLU(128, 192)
    holder = nn.ModuleList([layer])
    x, grad = drawn(70, 128).requires_grad_(), drawn(70, 128, seed=2)
    for module in [layer.gate_up_proj, layer.down_proj]:
        module.__class__ = Fp8Linear
    layer.__class__ = Fp8SwiGLU
    layer.gate_up_proj.matrices = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(holder[0], Fp8SwiGLU)
    y = layer(x)
    y.backward(grad)
    first, down = layer.gate_up_proj.weight.detach(), layer.down_proj.weight.detach()
    narrow_first = torch.cat([rounded(half, BLOCK) for half in first.split(192)])
    gate_up = rounded(x.detach(), ROW_TILE) @ narrow_first.T
    close(y, rounded(swiglu_by_hand(gate_up, None), ROW_TILE) @ rounded(down, BLOCK).T)
    again = rounded(gate_up, ROW_TILE).requires_grad_()
    hidden = swiglu_by_hand(again, None)
    close(layer.down_proj.weight.grad, rounded(grad, COLUMN_TILE).T @ rounded(hidden.detach(), COLUMN_TILE))
    hidden.backward(rounded(grad, ROW_TILE) @ rounded(down, BLOCK))
    assert again.grad is not None
    halves = zip(again.grad.split(192, dim=1), first.split(192), strict=True)
    close(x.grad, sum((rounded(g, ROW_TILE) @ rounded(w, BLOCK) for g, w in halves), torch.zeros(())))


def test_experts_see_their_own_rows_as_they_were_sent():
    experts = Experts(ModelConfig.from_dict(SHAPE))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    experts.__class__ = Fp8Experts
    ends, spans = torch.tensor([140, 140, 150, 200], dtype=torch.int32), [(0, 140), (140, 140), (140, 150), (150, 200)]
    x, weight_M, grad = (
        drawn(200, 128).requires_grad_(),
        drawn(200, seed=4).abs().requires_grad_(),
        drawn(200, 128, seed=2),
    )
    y = experts.feed_forward(x, weight_M, ends)
    y.backward(grad)
    assert x.grad is not None
    assert experts.gate_up_proj.grad is not None
    assert experts.down_proj.grad is not None
    assert weight_M.grad is not None
    for expert, (start, stop) in enumerate(spans):
        if stop == start:
            assert not experts.down_proj.grad[expert].any()
            continue
        sent = rounded(x.detach()[start:stop], ROW_TILE, True)
        first, down = experts.gate_up_proj.detach()[expert], rounded(experts.down_proj.detach()[expert], BLOCK)
        narrow_first = torch.cat([rounded(half, BLOCK) for half in first.split(64)])
        gate_up = sent @ narrow_first.T
        weights = weight_M.detach()[start:stop]
        close(y[start:stop], rounded(swiglu_by_hand(gate_up, weights), ROW_TILE) @ down.T)
        again, weights = rounded(gate_up, ROW_TILE).requires_grad_(), weights.requires_grad_()
        hidden = swiglu_by_hand(again, weights)
        by_rows = rounded(grad[start:stop], ROW_TILE, True)
        by_columns = rounded(by_rows, COLUMN_TILE, True)
        close(experts.down_proj.grad[expert], by_columns.T @ rounded(hidden.detach(), COLUMN_TILE))
        hidden.backward(by_rows @ down)
        close(weight_M.grad[start:stop], weights.grad if weights.grad is not None else weights)
        assert again.grad is not None
        halves = again.grad.split(64, dim=1)
        narrow_halves = narrow_first.split(64)
        sums = [rounded(g, ROW_TILE) @ w for g, w in zip(halves, narrow_halves, strict=True)]
        close(x.grad[start:stop], sums[0] + sums[1])
        turned = torch.cat([rounded(g, COLUMN_TILE).T for g in halves]) @ rounded(sent, COLUMN_TILE, True)
        close(experts.gate_up_proj.grad[expert], turned)


@pytest.mark.parametrize("documents", [False, True])
def test_attention_s_core_but_for_what_it_keeps(documents: bool):
    """Its result is the kernel's own; its gradient is that of an output in 12 bits, which is near that of the whole."""
    attention = decoder().model.layers[0].self_attn
    attention.__class__ = Fp8Attention
    q, k, v = (drawn(2, 2, 24, 24, seed=seed).requires_grad_() for seed in (1, 2, 3))
    ids = (torch.arange(24) // 9).expand(2, 24)
    mask = (ids[:, :, None] == ids[:, None, :]) & torch.ones(24, 24, dtype=torch.bool).tril() if documents else None
    out, packed, exponents = _Core.apply(q, k, v, mask, attention.scale, 16)
    plain = attention.joined(attention.core(q, k, v, mask))
    torch.testing.assert_close(out, plain)
    assert packed.dtype == torch.uint8
    assert exponents.dtype == torch.int8
    grad = drawn(2, 24, 32, seed=5)
    found = torch.autograd.grad(out, (q, k, v), grad)
    expected = torch.autograd.grad(plain, (q, k, v), grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert 0 <= (ours - theirs).norm() < 0.02 * theirs.norm()
    assert torch.equal(found[2], expected[2])  # the values' gradient needs no output


def kept_bytes(run: Callable[[], Any], parameters: list[nn.Parameter]) -> int:
    """Of all tensors that a graph keeps, each storage once, the parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(storages.values())
    del result
    return total


def test_layers_keep_a_byte_and_not_four():
    layer = Fp8Linear(256, 128, bias=False)
    x = drawn(1024, 256).requires_grad_()
    weights = 256 * 128 + 4 * 2
    assert kept_bytes(lambda: layer(x), [layer.weight]) == 1024 * 256 + 4 * 8 * 256 + weights
    experts = Experts(ModelConfig.from_dict({**SHAPE, "moe_intermediate_size": 128}))
    experts.__class__ = Fp8Experts
    x, ends = drawn(1024, 128).requires_grad_(), torch.tensor([256, 512, 768, 1024], dtype=torch.int32)
    sent, gate_up = 1024 * (128 + 4), 1024 * (256 + 2 * 4)
    weights = 4 * (3 * 128 * 128 + 3 * 4)
    parameters = list(experts.parameters())
    weight_M = torch.ones(1024)
    small = 4 * 1024 + ends.numel() * 4  # routing weights and where experts end
    assert kept_bytes(lambda: experts.feed_forward(x, weight_M, ends), parameters) == sent + gate_up + weights + small


@pytest.mark.parametrize("autocast", [False, True])
def test_a_decoder_learns_and_recomputes_to_the_bit(autocast: bool):
    model, ids, aim = decoder(), torch.arange(48).view(2, 24), drawn(2, 24, 128)
    narrow = copy.deepcopy(model)
    use_fp8(narrow)

    def gradients(model: Decoder, recompute: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.trunk(ids, recompute=recompute)
            total = (out.hidden_BTD * aim).sum() + (out.mtp_hidden[0] * aim[:, 1:]).sum()
        total.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, ours, again = gradients(model, False), gradients(narrow, False), gradients(narrow, True)
    assert ours.keys() == plain.keys()
    for name, gradient in ours.items():
        assert torch.equal(gradient, again[name])
        assert F.cosine_similarity(gradient.flatten(), plain[name].flatten(), 0) > 0.8


def test_attention_reads_what_a_cache_has_from_others() -> None:
    """A cache that gives back what it is given changes nothing; one that has more is read in full."""
    model, ids = decoder(), torch.arange(40).view(2, 20)
    use_fp8(model)
    attention, x = model.model.layers[0].self_attn, drawn(2, 20, 128)
    seen: list[AttentionInputs] = []
    attention.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    model.trunk(ids)
    inputs = seen[0]
    (group,) = inputs.groups

    class Same:
        def extend(self, layer_index: int, latent_BTC: Tensor, positions_BT: Tensor, num_slots: int) -> Tensor:
            return latent_BTC * self.factor

        factor = 1.0

    mask = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 20, 20)
    cached = replace(inputs, groups=(replace(group, cache=Same(), mask_BTS=mask),))
    torch.testing.assert_close(attention(x, cached, 0), attention(x, inputs, 0))
    Same.factor = 2.0
    assert not torch.allclose(attention(x, cached, 0), attention(x, inputs, 0))
