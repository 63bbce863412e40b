"""Rows against a loop over tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.data.packing import TokenStream, pack_rows


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    seq_len=st.integers(1, 8),
    mask_documents=st.booleans(),
    silent=st.integers(0, 3),
    step=st.integers(1, 3),
)
def test_rows_equal_a_naive_loop(lengths, seq_len, mask_documents, silent, step) -> None:
    begins = [place == 0 for length in lengths for place in range(length)]
    counts = [(place + length) % 4 >= silent for length in lengths for place in range(length)]
    rows = (len(begins) - 1) // seq_len
    if rows == 0:
        return
    whole = TokenStream(np.arange(100, 100 + len(begins), dtype=np.int32), np.array(counts), np.array(begins))
    batch = pack_rows(whole[: rows * seq_len + 1], seq_len, mask_documents, first_row=step - 1, row_step=step)
    chosen = list(range(step - 1, rows, step))
    assert batch.input_ids_BT.shape == (len(chosen), seq_len)
    for b, row in enumerate(chosen):
        position = document = 0
        for t in range(seq_len):
            place = row * seq_len + t
            if t > 0 and begins[place]:
                document += 1
                position = 0 if mask_documents else position
            label = 100 + place + 1
            if not counts[place + 1] or (mask_documents and begins[place + 1]):
                label = -100
            found = [int(part[b, t]) for part in vars(batch).values()]
            assert found == [100 + place, label, position, document]
            position += 1


def test_tensors_are_int64_and_own_their_memory() -> None:
    stream = TokenStream(np.arange(5, dtype=np.int32), np.ones(5, dtype=bool), np.zeros(5, dtype=bool))
    batch = pack_rows(stream, 2, False)
    for part in vars(batch).values():
        assert part.dtype.is_signed
        assert part.element_size() == 8
        assert part.is_contiguous()
    batch.input_ids_BT[0, 0] = 77
    assert stream.tokens[0] == 0


def test_a_label_across_documents_counts_unless_they_are_masked() -> None:
    # Two documents of three tokens, as the report packs them (section 4.1) and with the mask.
    stream = TokenStream(np.array([0, 5, 1, 0, 6, 1, 0]), np.ones(7, dtype=bool), np.array([1, 0, 0, 1, 0, 0, 1]) == 1)
    plain, masked = pack_rows(stream, 6, False), pack_rows(stream, 6, True)
    assert plain.labels_BT.tolist() == [[5, 1, 0, 6, 1, 0]]
    assert plain.positions_BT.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert masked.labels_BT.tolist() == [[5, 1, -100, 6, 1, -100]]
    assert masked.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2]]
    for batch in (plain, masked):
        assert batch.document_ids_BT.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_a_stretch_that_is_too_short_is_our_mistake() -> None:
    with pytest.raises(ValueError, match="window"):
        pack_rows(TokenStream(np.zeros(3), np.ones(3, dtype=bool), np.ones(3, dtype=bool)), 5, False)
