"""Multi-token prediction: transformers' MTP layers and a loop over rows are the oracles of shift, order and names."""

import pytest
import torch

from fireflyer.model.attention import AttentionGroup, AttentionInputs
from fireflyer.model.cache import ContiguousCache
from fireflyer.model.rope import rope_cos_sin, rope_frequencies


def drafted(model, theirs, input_ids):
    """Hidden states of every depth as transformers computes them: each depth takes the one before and later tokens."""
    tokens = input_ids.shape[1]
    hidden, result = model.trunk(input_ids).hidden_BTD, []
    for depth in range(1, len(model.model.mtp) + 1):
        later, positions = input_ids[:, depth:], torch.arange(depth, tokens)[None]
        hidden = theirs.forward_layer(depth - 1, hidden[:, : tokens - depth], positions, None, input_ids=later)
        result.append(hidden)
    return result


@pytest.mark.parametrize(("kind", "depths"), [("v3", 1), ("v3", 3), ("moonlight", 2), ("k2", 2)])
def test_hidden_states_and_logits_equal_transformers(kind, depths, tiny, twin, mtp_twin, ids):
    model = tiny(kind, num_nextn_predict_layers=depths)
    theirs = mtp_twin(model, twin(model))
    input_ids = ids(2, 50)
    with torch.no_grad():
        expected = drafted(model, theirs, input_ids)
        out, logits = model.trunk(input_ids), model(input_ids).mtp_logits
        assert len(logits) == depths
        for k in range(depths):
            torch.testing.assert_close(out.mtp_hidden[k], expected[k], rtol=0, atol=3e-5)
            torch.testing.assert_close(logits[k], theirs.shared_head(expected[k]), rtol=0, atol=1e-4)


def test_the_hidden_state_that_transformers_drafts_from_is_the_normed_one(tiny, twin, ids):
    """Its candidate generator passes `hidden_states[-1]`, which is the main model's output after the last norm."""
    model = tiny("v3", num_nextn_predict_layers=1)
    with torch.no_grad():
        theirs = twin(model)(ids(1, 30), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(model.trunk(ids(1, 30)).hidden_BTD, theirs, rtol=0, atol=3e-5)


def test_swapping_embedding_and_hidden_shows(tiny, twin, mtp_twin, ids):
    """Control of the oracle: with the halves of eh_proj swapped, as the report's equation has them, nothing agrees."""
    model = tiny("v3", num_nextn_predict_layers=1)
    theirs = mtp_twin(model, twin(model))
    with torch.no_grad():
        projection = model.model.mtp[0].eh_proj.weight
        projection.copy_(torch.cat(projection.chunk(2, dim=1)[::-1], dim=1))
        (expected,) = drafted(model, theirs, ids(2, 50))
        (hidden,) = model.trunk(ids(2, 50)).mtp_hidden
    assert (hidden - expected).abs().mean() > 0.1


def row_by_row(model, sequence):
    """Hidden states of every depth, each row put together by hand; the whole chain is one sequence at a time."""
    tokens = len(sequence)
    table = model.model.embed_tokens.weight
    previous = list(model.trunk(sequence[None], num_mtp=0).hidden_BTD[0])
    result = []
    for k, module in enumerate(model.model.mtp, start=1):
        rows = []
        for i in range(tokens - k):
            embedding, hidden = table[sequence[i + k]], previous[i]
            joined = torch.cat((module.enorm(embedding[None])[0], module.hnorm(hidden[None])[0]))
            rows.append(module.eh_proj.weight @ joined)
        positions = torch.arange(tokens - k)[None]
        cos, sin = rope_cos_sin(rope_frequencies(model.config), positions, 1.0)
        inputs = AttentionInputs(cos, sin, (AttentionGroup(positions, None, None, tokens - k, "expanded"),))
        block_out = module.block(torch.stack(rows)[None], inputs)[0]
        previous = list(module.norm(block_out)[0])
        result.append(torch.stack(previous))
    return result


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_the_shift_equals_rows_put_together_by_hand(depths, tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=depths)
    with torch.no_grad():
        out = model.trunk(ids(2, 20)).mtp_hidden
        for b, sequence in enumerate(ids(2, 20)):
            for k, expected in enumerate(row_by_row(model, sequence), start=1):
                assert out[k - 1].shape == (2, 20 - k, 48)
                torch.testing.assert_close(out[k - 1][b], expected, rtol=0, atol=2e-5)


def test_each_depth_sees_exactly_the_tokens_it_may(tiny, ids):
    """Position i of depth k predicts token i+k+1 from tokens up to i+k: a later token never changes a bit of it.

    Without experts: how many rows an expert gets changes how its matrix product rounds.
    """
    model = tiny("v3", num_nextn_predict_layers=3, n_routed_experts=0)
    input_ids = ids(1, 12)
    with torch.no_grad():
        before = model(input_ids)
        for changed in range(12):
            other = input_ids.clone()
            other[0, changed] = (other[0, changed] + 1) % 96
            after = model(other)
            pairs = zip([before.logits, *before.mtp_logits], [after.logits, *after.mtp_logits], strict=True)
            for k, (a, b) in enumerate(pairs):
                differs = (a - b).abs().amax(-1)[0] > 0
                assert not differs[: max(changed - k, 0)].any()
                assert differs[max(changed - k, 0) :].all()


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_depths_beyond_the_sequence_are_left_out(tokens, tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=3)
    out = model(ids(2, tokens))
    assert out.logits.shape == (2, tokens, 96)
    assert [logits.shape for logits in out.mtp_logits] == [(2, tokens - k, 96) for k in range(1, tokens)]


def test_num_mtp_limits_the_depths(tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=3)
    with torch.no_grad():
        every = model.trunk(ids(2, 10))
        two = model.trunk(ids(2, 10), num_mtp=2)
        assert model.trunk(ids(2, 10), num_mtp=0).mtp_hidden == []
    assert len(every.mtp_hidden) == 3
    assert [r.layer_index for r in two.routing] == [1, 2, 3, 4]
    assert all(torch.equal(a, b) for a, b in zip(every.mtp_hidden, two.mtp_hidden, strict=False))


def test_names_and_order_of_the_parameters(tiny):
    """Embedding and head are the main model's; a module owns two norms, the projection, a block and its last norm."""
    model = tiny("v3", num_nextn_predict_layers=2)
    names = [name for name in model.state_dict() if name.startswith("model.mtp.1.")]
    block = [name.removeprefix("model.layers.2.") for name in model.state_dict() if name.startswith("model.layers.2.")]
    assert sorted(names) == sorted(
        f"model.mtp.1.{name}"
        for name in (
            ["enorm.weight", "hnorm.weight", "eh_proj.weight", "norm.weight"] + [f"block.{name}" for name in block]
        )
    )
    assert model.model.mtp[0].eh_proj.weight.shape == (48, 96)


def test_a_cache_serves_the_depths_too(tiny, ids):
    """The same hidden states as without; every visible slot was written."""
    model = tiny("v3", num_nextn_predict_layers=2)
    cache = ContiguousCache(model.config, 2, 32)
    with torch.no_grad():
        expected = model(ids(2, 30))
        assert model(ids(2, 30), cache=ContiguousCache(model.config, 2, 32)).mtp_logits == []
        out = model(ids(2, 30), cache=cache, num_mtp=2)
    for k in range(2):
        torch.testing.assert_close(out.mtp_logits[k], expected.mtp_logits[k], rtol=0, atol=5e-5)
        written = cache.slots[3 + k].abs().sum(-1) > 0
        assert written[:, : 29 - k].all()
        assert not written[:, 29 - k :].any()
