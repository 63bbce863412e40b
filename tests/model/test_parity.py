"""Logits and gradients against transformers 5.24, whose DeepSeek-V2 and V3 are the oracle."""

import pytest
import torch
import torch.nn.functional as F

KINDS = ["v2", "v2-lite", "v3", "moonlight", "k2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_transformers(kind, seed, tiny, twin, ids):
    """Past the original length of 32 too, where YaRN's frequencies and its softmax scale matter."""
    model = tiny(kind, seed)
    input_ids = ids(2, 100, seed)
    with torch.no_grad():
        expected = twin(model)(input_ids).logits
        logits = model(input_ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", ["v2", "v3", "k2"])
def test_positions_need_not_start_at_zero_or_be_neighbours(kind, tiny, twin, ids):
    model = tiny(kind)
    input_ids = ids(2, 40)
    positions = torch.stack((torch.arange(40) + 37, 3 * torch.arange(40)))
    with torch.no_grad():
        expected = twin(model)(input_ids, position_ids=positions, attention_mask=torch.ones(2, 1, 40, 40).tril().log())
        logits = model(input_ids, positions=positions).logits
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("amplitudes", [(1.0, 0.707), (0.707, 1.0), (1.0, 0.0)])
def test_logits_equal_transformers_where_yarn_changes_the_amplitude(amplitudes, tiny, twin, ids):
    """No released model does, but the two corrections of YaRN are separate and each has its place."""
    mscale, mscale_all_dim = amplitudes
    scaling = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 4, "beta_slow": 1}
    model = tiny("v3", rope_scaling=scaling | {"mscale": mscale, "mscale_all_dim": mscale_all_dim})
    with torch.no_grad():
        expected = twin(model)(ids(2, 100)).logits
        logits = model(ids(2, 100)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_transformers(kind, tiny, twin, their_names, ids):
    """Every parameter's, after a cross entropy; the gate's too, which learns through the combine weights alone."""
    model = tiny(kind)
    theirs = twin(model)
    input_ids = ids(2, 64)
    labels = input_ids[:, 1:].flatten()
    F.cross_entropy(theirs(input_ids).logits[:, :-1].flatten(0, 1), labels).backward()
    F.cross_entropy(model(input_ids).logits[:, :-1].flatten(0, 1), labels).backward()
    ours = their_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    assert any(name.endswith("mlp.gate.weight") for name in ours)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        worst = (ours[name] - gradient).abs().max() / gradient.abs().max()
        assert worst < 1e-4, (name, float(worst))


def test_head_shared_with_the_embedding_equals_transformers(tiny, twin, ids):
    model = tiny("v3", tie_word_embeddings=True)
    theirs = twin(model)
    assert "lm_head.weight" not in model.state_dict()
    with torch.no_grad():
        torch.testing.assert_close(model(ids(1, 50)).logits, theirs(ids(1, 50)).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("changes", [{"n_shared_experts": 2}, {"first_k_dense_replace": 0}, {"v_head_dim": 24}])
def test_other_shapes_equal_transformers(changes, tiny, twin, ids):
    """v_head_dim 24 is wider than the 20 of queries and keys: the narrower are padded, whichever they are."""
    model = tiny("v3", **changes)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(1, 50)).logits, twin(model)(ids(1, 50)).logits, rtol=0, atol=5e-5)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_bf16_runs_and_stays_near_fp32(form, tiny, ids):
    """Same weights; without experts, whose choice a rounding may flip."""
    model = tiny("v3", n_routed_experts=0).to(torch.bfloat16)
    with torch.no_grad():
        rounded = model(ids(2, 60), form=form).logits
        exact = model.float()(ids(2, 60)).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).std() < 0.03 * exact.std()


def test_bf16_trains(tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=1).to(torch.bfloat16)
    out = model(ids(2, 40))
    (out.logits.float().logsumexp(-1).mean() + out.mtp_logits[0].float().logsumexp(-1).mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all(), name
