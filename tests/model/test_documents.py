"""Packed rows with a document mask: a document is alone in its row, in the main logits and at every MTP depth."""

import pytest
import torch

LENGTHS = (13, 1, 20, 6)


def pack(ids):
    """(ids, positions, document ids) of two rows of four documents; a document of one token among them."""
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)]).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    return ids(2, sum(LENGTHS)), positions, documents


def spans():
    start = 0
    for n in LENGTHS:
        yield start, start + n
        start += n


@pytest.mark.parametrize(("changed", "kept"), [((0, 13), (13, 40)), ((34, 40), (0, 34))])
@pytest.mark.parametrize("experts", [0, 16])
def test_changing_one_document_leaves_the_others_as_they_were(experts, changed, kept, tiny, ids):
    """Bit-equal, and so are the experts chosen.

    Where there are experts, how many rows each gets changes how its matrix product rounds: equal to rounding then.
    At MTP depth k the last k rows of a document hold a token of the next, and their labels are not its own.
    """
    model = tiny("v3", num_nextn_predict_layers=2, n_routed_experts=experts)
    input_ids, positions, documents = pack(ids)
    other = input_ids.clone()
    other[:, slice(*changed)] = (other[:, slice(*changed)] + 7) % 96
    with torch.no_grad():
        before = model(input_ids, positions=positions, document_ids=documents)
        after = model(other, positions=positions, document_ids=documents)
        routed = [model.trunk(x, positions=positions, document_ids=documents).routing for x in (input_ids, other)]
        leaky = model(other, positions=positions).logits - model(input_ids, positions=positions).logits
    assert not torch.equal(before.logits[:, slice(*changed)], after.logits[:, slice(*changed)])
    pairs = zip([before.logits, *before.mtp_logits], [after.logits, *after.mtp_logits], strict=True)
    for k, (a, b) in enumerate(pairs):
        rows = slice(kept[0], kept[1] - k)
        if experts:
            torch.testing.assert_close(a[:, rows], b[:, rows], rtol=0, atol=2e-5)
        else:
            assert torch.equal(a[:, rows], b[:, rows])
    for a, b in zip(*routed, strict=True):
        chosen_before, chosen_after = (r.indices_NK.unflatten(0, r.shape_BT) for r in (a, b))
        rows = slice(kept[0], kept[1] - 2)
        assert torch.equal(chosen_before[:, rows], chosen_after[:, rows])
    if changed[0] < kept[0]:
        # The control: restarted positions alone isolate nothing.
        assert leaky[:, slice(*kept)].abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_a_packed_row_equals_its_documents_alone(form, tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=2)
    input_ids, positions, documents = pack(ids)
    with torch.no_grad():
        out = model(input_ids, positions=positions, document_ids=documents, form=form)
        unmasked = model(input_ids, positions=positions, form=form)
        for start, end in spans():
            alone = model(input_ids[:, start:end])
            torch.testing.assert_close(out.logits[:, start:end], alone.logits, rtol=0, atol=3e-5)
            for k, expected in enumerate(alone.mtp_logits, start=1):
                hidden = out.mtp_logits[k - 1][:, start : end - k]
                torch.testing.assert_close(hidden, expected, rtol=0, atol=3e-5)
            if start:
                assert (unmasked.logits[:, start:end] - alone.logits).abs().max() > 1e-2


def test_gradients_stay_within_the_document(tiny, ids):
    model = tiny("v3", num_nextn_predict_layers=2)
    input_ids, positions, documents = pack(ids)
    embeds = model.model.embed_tokens(input_ids).detach().requires_grad_()
    out = model.trunk(inputs_embeds=embeds, positions=positions, document_ids=documents)
    (out.hidden_BTD[:, 14:34].sum() + out.mtp_hidden[0][:, 14:33].sum()).backward()
    assert embeds.grad is not None
    touched = embeds.grad.abs().sum(-1) > 0
    assert touched[:, 14:34].all()
    assert not touched[:, :14].any()
    assert not touched[:, 34:].any()
