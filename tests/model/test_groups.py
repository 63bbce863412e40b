"""A call of several groups, as an engine makes it: every row as in the plain call of its own sequence."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from fireflyer.model.attention import AttentionGroup
from fireflyer.model.cache import ContiguousCache

CLOSE = {"rtol": 0, "atol": 5e-5}


def at(start, stop, sequences=1):
    return torch.arange(start, stop).expand(sequences, -1)


def up_to_own_position(positions_BT, num_slots):
    return torch.arange(num_slots) <= positions_BT[..., None]


@pytest.mark.parametrize("chunk_form", ["expanded", "absorbed"])
@pytest.mark.parametrize("kind", ["v3", "v2-lite"])
def test_decoding_rows_a_first_and_a_later_chunk_in_one_call(kind, chunk_form, tiny, ids):
    """Two sequences that decode at unequal lengths, one prompt that begins, one that goes on."""
    model = tiny(kind)
    sequences = [ids(1, n, seed=n)[0] for n in (12, 30, 17, 41)]
    caches = (
        ContiguousCache(model.config, 2, 48),
        ContiguousCache(model.config, 1, 48),
        ContiguousCache(model.config, 1, 48),
    )
    with torch.no_grad():
        whole = [model(sequence[None]).logits[0] for sequence in sequences]
        model(pad_sequence([sequence[:-1] for sequence in sequences[:2]], batch_first=True), cache=caches[0])
        model(sequences[3][None, :25], cache=caches[2])
        decoding = torch.tensor([[11], [29]])
        groups = [
            AttentionGroup(decoding, up_to_own_position(decoding, 30), caches[0], 30, "absorbed"),
            AttentionGroup(at(0, 17), None, caches[1], 17, chunk_form),
            AttentionGroup(at(25, 41), up_to_own_position(at(25, 41), 41), caches[2], 41, chunk_form),
        ]
        rows = torch.cat((sequences[0][-1:], sequences[1][-1:], sequences[2], sequences[3][25:]))
        positions = torch.cat([group.positions_BT.flatten() for group in groups])
        hidden = model.trunk(rows[None], positions=positions[None], groups=groups).hidden_BTD
    expected = torch.cat((whole[0][-1:], whole[1][-1:], whole[2], whole[3][25:]))
    torch.testing.assert_close(model.head(hidden)[0], expected, **CLOSE)


def test_one_group_of_another_shape_than_the_call(tiny, ids):
    model = tiny("v3")
    with torch.no_grad():
        whole = model.trunk(ids(3, 9)).hidden_BTD
        groups = [AttentionGroup(at(0, 9, 3), None, None, 9, "expanded")]
        hidden = model.trunk(ids(3, 9).view(1, -1), positions=at(0, 9, 3).reshape(1, -1), groups=groups).hidden_BTD
    torch.testing.assert_close(hidden.view(3, 9, -1), whole, **CLOSE)


def test_a_step_of_each_mtp_depth(tiny, ids):
    """In two calls over a cache, two sequences beside each other: as the plain trunk's depths."""
    model = tiny("v3", num_nextn_predict_layers=2)
    input_ids = ids(2, 20)
    caches = [ContiguousCache(model.config, 1, 20) for _ in range(2)]
    with torch.no_grad():
        out = model.trunk(input_ids)
        previous = out.hidden_BTD
        for depth, expected in enumerate(out.mtp_hidden):
            parts = []
            for start, stop in ((0, 7), (7, 19 - depth)):
                positions = at(start, stop)
                groups = [
                    AttentionGroup(positions, up_to_own_position(positions, stop), cache, stop, "expanded")
                    for cache in caches
                ]
                hidden = model.mtp_step(
                    depth,
                    previous[:, start:stop].reshape(1, -1, 48),
                    input_ids[:, start + depth + 1 : stop + depth + 1].reshape(1, -1),
                    positions.repeat(1, 2),
                    groups,
                )
                parts.append(hidden.view(2, stop - start, -1))
            previous = torch.cat(parts, 1)
            torch.testing.assert_close(previous, expected, **CLOSE)
