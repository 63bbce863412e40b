"""The optimizer against naive loops in float64: AdamW by its formula, Muon one published matrix after the other."""

import math

import pytest
import torch
from torch import Tensor, nn

from fireflyer.config import ModelConfig
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.train.optimizer import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    muon_parts,
    optimizer_tensors,
)
from fireflyer.train.recipe import load_recipe
from fireflyer.train.settings import OptimizerSettings, PrecisionSettings, Recipe

RATES = [1e-2, 2e-2, 5e-3]


def tiny_recipe(**optimizer: object) -> Recipe:
    shape = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 3,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0, "max_position_embeddings": 64,
        "num_nextn_predict_layers": 1,
    }  # fmt: skip
    model = ModelConfig.from_dict(shape)
    settings = OptimizerSettings.model_validate(optimizer)
    return Recipe.model_validate({"model": model, "optimizer": settings, "steps": 3, "batch_size": 1, "seq_len": 8})


def tiny_model(recipe: Recipe) -> Decoder:
    model = Decoder(recipe.model)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def naive_adamw(weight: Tensor, grads: list[Tensor], decay: float) -> Tensor:
    weight, first, second = weight.double(), 0.0, 0.0
    for t, (grad, lr) in enumerate(zip(grads, RATES, strict=True), start=1):
        grad = grad.double()
        first = 0.9 * first + 0.1 * grad
        second = 0.95 * second + 0.05 * grad * grad
        update = (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight - lr * decay * weight - lr * update
    return weight


def naive_narrow_adamw(weight: Tensor, grads: list[Tensor], decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and moments; these go through bf16 between steps."""
    weight, first, second = weight.double(), torch.zeros_like(weight).double(), torch.zeros_like(weight).double()
    for t, (grad, lr) in enumerate(zip(grads, RATES, strict=True), start=1):
        first, second = 0.9 * first + 0.1 * grad.double(), 0.95 * second + 0.05 * grad.double().square()
        update = (first / (1 - 0.9**t)) / ((second / (1 - 0.95**t)).sqrt() + 1e-8)
        weight = weight - lr * decay * weight - lr * update
        first, second = first.bfloat16().double(), second.bfloat16().double()
    return weight, first, second


def naive_newton_schulz(matrix: Tensor) -> Tensor:
    """Keller Jordan's quintic iteration in float64, on the wide side."""
    x = matrix.double()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def naive_muon(weight: Tensor, grads: list[Tensor], decay: float, momentum: float) -> Tensor:
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for grad, lr in zip(grads, RATES, strict=True):
        buffer = momentum * buffer + (1 - momentum) * grad.double()
        update = naive_newton_schulz(momentum * buffer + (1 - momentum) * grad.double())
        weight = weight - lr * decay * weight - lr * 0.2 * math.sqrt(max(weight.shape)) * update
    return weight


def three_steps(
    recipe: Recipe, state: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Decoder]:
    """state: filled with what the optimizer keeps."""
    model = tiny_model(recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    grads: dict[str, list[Tensor]] = {name: [] for name in before}
    optimizer = build_optimizer(model, recipe)
    for seed, lr in enumerate(RATES):
        set_gradients(model, seed)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            grads[name].append(parameter.grad.clone())
        optimizer.step(lr)
        optimizer.zero_grad()
    if state is not None:
        state.update(optimizer_tensors(optimizer))
    return before, grads, model


def test_adamw_equals_its_formula_and_spares_the_norms_from_decay() -> None:
    before, grads, model = three_steps(tiny_recipe(weight_decay=0.3))
    for name, parameter in model.named_parameters():
        decay = 0.0 if "norm" in name else 0.3
        expected = naive_adamw(before[name], grads[name], decay)
        torch.testing.assert_close(parameter.double(), expected, rtol=2e-6, atol=2e-6, msg=name)


def test_moments_in_bf16_are_rounded_after_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fireflyer.train.narrow_adamw._AT_A_TIME", 50)  # a parameter in several stretches
    recipe = tiny_recipe(weight_decay=0.3)
    recipe = recipe.model_copy(update={"precision": PrecisionSettings(moments="bf16")})
    state: dict[str, Tensor] = {}
    before, grads, model = three_steps(recipe, state)
    for name, parameter in model.named_parameters():
        weight, first, second = naive_narrow_adamw(before[name], grads[name], 0.0 if "norm" in name else 0.3)
        torch.testing.assert_close(parameter.double(), weight, rtol=2e-6, atol=2e-6, msg=name)
        for moment, expected in (("exp_avg", first), ("exp_avg_sq", second)):
            found = state[f"{name}.{moment}"]
            assert found.dtype == torch.bfloat16
            # Beside a tie fp32 and float64 may round to two neighbours.
            torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=1e-12, msg=name)
            assert (found.double() == expected).double().mean() > 0.98
    again = build_optimizer(model, recipe)
    load_optimizer_tensors(again, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer_tensors(again).items())


def test_the_gate_bias_is_none_of_the_optimizers_business() -> None:
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    names = optimizer_tensors(build_optimizer(model, recipe))
    assert not any("e_score_correction_bias" in name for name in names)
    assert len(names) == 3 * len(list(model.parameters()))


def by_part(name: str) -> list[tuple[object, ...]]:
    """Index of every published matrix in a hidden parameter: (), or (expert,), or with the half of gate and up."""
    experts: list[tuple[object, ...]] = [(e,) for e in range(3)] if ".experts." in name else [()]
    width = 8 if "experts" in name or "mtp" in name or "layers.1" in name else 24
    if "gate_up" in name:
        return [(*expert, half) for expert in experts for half in (slice(0, width), slice(width, 2 * width))]
    return experts


def test_muon_equals_a_loop_over_the_published_matrices_and_adamw_has_the_rest() -> None:
    before, grads, model = three_steps(tiny_recipe(name="muon", weight_decay=0.3, muon_momentum=0.5))
    on_adamw = []
    for name, parameter in model.named_parameters():
        if name.startswith(("model.embed", "lm_head")) or "norm" in name or name.endswith("mlp.gate.weight"):
            on_adamw.append(name)
            expected = naive_adamw(before[name], grads[name], 0.0 if "norm" in name else 0.3)
            torch.testing.assert_close(parameter.double(), expected, rtol=2e-6, atol=2e-6, msg=name)
            continue
        for part in by_part(name):
            expected = naive_muon(before[name][part], [grad[part] for grad in grads[name]], 0.3, 0.5)
            moved = expected - before[name][part].double()
            # torch runs Newton-Schulz in bf16; gate and up taken as one matrix would be off by a third and more.
            error = (parameter[part].double() - expected).norm() / moved.norm()
            assert error < 0.03, (name, part, float(error))
    assert len(on_adamw) == 2 + 2 + len([name for name in before if "norm" in name])


def test_muon_sees_each_expert_by_itself() -> None:
    recipe = tiny_recipe(name="muon", weight_decay=0.0)
    model = tiny_model(recipe)
    optimizer = build_optimizer(model, recipe)
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    before = experts.detach().clone()
    experts.grad = torch.randn(experts.shape, generator=torch.Generator().manual_seed(0))
    experts.grad[1] = 0
    optimizer.step(1e-2)
    changed = (experts.detach() != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]


def test_muon_parts_are_views_that_cover_everything_once() -> None:
    stack = torch.zeros(3, 8, 5)
    for number, part in enumerate(muon_parts("x.experts.gate_up_proj", stack)):
        assert part.shape == (4, 5)
        part += number + 1
    assert stack[:, :, 0].tolist() == [[1] * 4 + [2] * 4, [3] * 4 + [4] * 4, [5] * 4 + [6] * 4]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_saved_state_goes_on_bit_for_bit(name: str) -> None:
    recipe = tiny_recipe(name=name)
    whole, first = tiny_model(recipe), tiny_model(recipe)
    optimizer = build_optimizer(whole, recipe)
    optimizer_first = build_optimizer(first, recipe)
    for seed in (0, 1):
        for model, each in ((whole, optimizer), (first, optimizer_first)):
            set_gradients(model, seed)
            each.step(RATES[seed])
    saved = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer_first).items()}
    second = tiny_model(recipe)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, recipe)
    load_optimizer_tensors(resumed, saved)
    for seed in (2, 3):
        for model, each in ((whole, optimizer), (second, resumed)):
            set_gradients(model, seed)
            each.step(3e-3)
    for key, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(key)), key
    state = optimizer_tensors(resumed)
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer_tensors(optimizer).items())


def test_foreign_state_is_refused_by_name_and_changes_nothing() -> None:
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    optimizer = build_optimizer(model, recipe)
    good = {key: torch.ones_like(tensor) for key, tensor in optimizer_tensors(optimizer).items()}
    name = "model.norm.weight.exp_avg"
    for bad in (
        {key: tensor for key, tensor in good.items() if key != name},
        {**good, name: torch.ones(3)},
        {**good, "model.norm.weight.other": torch.ones(3)},
    ):
        with pytest.raises(UserError, match=r"model\.norm\.weight"):
            load_optimizer_tensors(optimizer, bad)
        assert all(not tensor.any() for tensor in optimizer_tensors(optimizer).values())


def test_clipping_scales_all_gradients_together_and_returns_the_norm_before() -> None:
    model = tiny_model(tiny_recipe())
    set_gradients(model, 0)
    grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    norm = float(grads.double().square().sum().sqrt())
    assert clip_gradients(model.parameters(), 0) == pytest.approx(norm, rel=1e-6)
    assert clip_gradients(model.parameters(), 1.0) == pytest.approx(norm, rel=1e-6)
    clipped = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(clipped, grads / norm, rtol=1e-5, atol=1e-7)
    assert clip_gradients(model.parameters(), 5.0) == pytest.approx(1.0, rel=1e-5)
    untouched = torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
    assert torch.equal(untouched, clipped)


def test_gradients_without_a_finite_norm_are_left_for_inspection() -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([1.0, float("inf"), 2.0])
    assert clip_gradients([weight], 1.0) == float("inf")
    assert weight.grad.tolist() == [1.0, float("inf"), 2.0]


def test_the_shipped_recipes_train_with_adamw_as_the_report() -> None:
    settings = load_recipe("deepseek-v3").optimizer
    assert (settings.name, settings.betas, settings.weight_decay, settings.grad_clip) == (
        "adamw",
        (0.9, 0.95),
        0.1,
        1.0,
    )
