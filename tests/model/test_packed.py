"""The decoder with packed weights against the plain decoder of the same numbers, with its inputs rounded by hooks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fireflyer.model.decoder import Decoder
from fireflyer.model.experts import MoE
from fireflyer.model.packed import PackedFormat, packed_decoder
from fireflyer.model.packed_experts import PackedExperts
from fireflyer.model.row_tiles import RowTiles
from fireflyer.numerics.integer import pack, pack_expert, unpack
from fireflyer.numerics.linear import NarrowLinear, PackedLinear

KINDS = ("int8", "int4")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 40, "num_nextn_predict_layers": 1}


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows to 255 steps between minus and plus their largest."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / step).round() * step


@torch.no_grad()
def packed_from(model: Decoder, kind: str) -> Decoder:
    """By hand: every module of the packed model filled from the same place of the plain one."""
    made = packed_decoder(model.config, PackedFormat(kind)).to_empty(device="cpu")
    own = model.state_dict()
    for name, module in made.named_modules():
        if isinstance(module, PackedLinear):
            weight = own.get(f"{name}.weight", own["model.embed_tokens.weight"])
            module.packed = pack(weight, module.shape.kind)[None]
        elif isinstance(module, PackedExperts):
            both, down = own[f"{name}.gate_up_proj"], own[f"{name}.down_proj"]
            module.packed = torch.stack([pack_expert(*b.chunk(2), d, kind) for b, d in zip(both, down, strict=True)])
        else:
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                tensor.copy_(own[f"{name}.{leaf}"])
    return made


class NaiveExperts(nn.Module):
    """Each token through each of its experts, with rounded inputs."""

    def __init__(self, packed: PackedExperts) -> None:
        super().__init__()
        sizes = [shape.num_bytes for shape in packed.shapes]
        self.experts = [
            [unpack(part, shape) for part, shape in zip(row.split(sizes), packed.shapes, strict=True)]
            for row in packed.packed
        ]

    def forward(self, x_ND, indices_NK, weights_NK, tiles=None):
        out = torch.zeros_like(x_ND)
        for n, (chosen, weights) in enumerate(zip(indices_NK.tolist(), weights_NK.tolist(), strict=True)):
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up, down = self.experts[expert]
                x = rounded(x_ND[n])
                out[n] += weight * (down @ rounded(F.silu(gate @ x) * (up @ x)))
        return out


def plain_twin(packed: Decoder) -> Decoder:
    """A Decoder of nn.Linear with the numbers that the packed one stands for; inputs are rounded before products."""
    twin = Decoder(packed.config).requires_grad_(False)
    if twin.lm_head is None:
        twin.lm_head = nn.Linear(packed.config.hidden_size, packed.config.vocab_size, bias=False)
    layers = dict(twin.named_modules())
    for name, module in packed.named_modules():
        target = layers.get(name)
        if isinstance(module, PackedLinear):
            target.weight.data = unpack(module.packed[0], module.shape)
            target.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        elif isinstance(module, MoE):
            target.experts = NaiveExperts(module.experts)
        elif not isinstance(module, PackedExperts):
            for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                dict(target.named_parameters(recurse=False)).get(leaf, getattr(target, leaf)).data = tensor.float()
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "changes"), [("v3", {}), ("v2", {"tie_word_embeddings": True})])
def test_a_packed_decoder_computes_what_its_numbers_stand_for(tiny, family, changes, kind):
    shape = {**SHAPE, **changes}
    if family == "v2":
        del shape["num_nextn_predict_layers"]
    packed = packed_from(tiny(family, **shape), kind)
    twin = plain_twin(packed)
    ids = torch.randint(0, packed.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = packed(ids), twin(ids)
    for one, other in zip([found.logits, *found.mtp_logits], [expected.logits, *expected.mtp_logits], strict=True):
        # A last bit may turn a rounded input by a whole step of 127, which later tokens of its row then see.
        error = (one - other).abs().amax(-1) / other.std()
        assert error.median() < 1e-4
        assert error.max() < 0.5


def test_what_chooses_and_normalises_stays_exact(tiny):
    model = tiny("v3", **SHAPE)
    packed = packed_from(model, "int4")
    own, kept = model.state_dict(), packed.state_dict()
    exact = [n for n in own if n.endswith(("norm.weight", "gate.weight", "e_score_correction_bias"))]
    assert len(exact) > 12
    for name in exact:
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name], own[name])


def test_latent_projections_have_eight_bits_or_more(tiny):
    packed = packed_from(tiny("v3", **SHAPE), "int4")
    attention = packed.model.layers[1].self_attn
    assert attention.q_a_proj.shape.kind == attention.kv_a_proj_with_mqa.shape.kind == "int8"
    assert isinstance(attention.kv_b_proj, NarrowLinear)
    assert attention.o_proj.shape.kind == attention.q_b_proj.shape.kind == "int4"
    assert packed.model.mtp[0].block.mlp.experts.shapes[0].kind == packed.model.mtp[0].eh_proj.shape.kind == "int4"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("tiles", [None, RowTiles()])
def test_packed_experts_are_the_loop_over_tokens(tiny, kind, tokens, tiles):
    experts = packed_from(tiny("v3", **SHAPE), kind).model.layers[1].mlp.experts
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 64, generator=generator)
    num = experts.packed.shape[0]
    indices = torch.stack([torch.randperm(num, generator=generator)[:3] for _ in range(tokens)])
    weights = torch.rand(tokens, 3, generator=generator)
    found, expected = experts(x, indices, weights, tiles), NaiveExperts(experts)(x, indices, weights)
    assert ((found - expected).abs().amax() / expected.std()) < 0.03
    assert ((found - expected).abs().median() / expected.std()) < 1e-3
    for n in (0, tokens - 1):  # alone as among others, to the bit
        row = slice(n, n + 1)
        assert torch.equal(experts(x[row], indices[row], weights[row], tiles), found[row])


def test_experts_come_from_a_store_where_there_is_one(tiny):
    experts = packed_from(tiny("v3", **SHAPE), "int8").model.layers[1].mlp.experts
    x, indices, weights = torch.randn(3, 64), torch.tensor([[4, 1], [1, 0], [4, 2]]), torch.rand(3, 2)
    expected = experts(x, indices, weights)
    kept, asked = experts.packed, []

    class Store:
        at_once = 3

        def in_order(self, wanted):
            return sorted(wanted, reverse=True)

        def take(self, wanted):
            assert len(wanted) <= self.at_once
            asked.extend(wanted)
            return [kept[expert] for expert in wanted]

    experts.store, experts.packed = Store(), torch.empty_like(kept)
    assert torch.equal(experts(x, indices, weights), expected)
    assert set(asked) == {0, 1, 2, 4}
