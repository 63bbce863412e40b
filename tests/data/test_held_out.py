"""Evaluation rows: fixed, of held-out text alone, with the bytes their labels stand for."""

import math

import pytest
import torch

from fireflyer.data.held_out import held_out_rows
from fireflyer.data.mixture import open_sources
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer


def rows_of(rows, field: str) -> torch.Tensor:
    return torch.cat([getattr(batch, field) for batch in rows.batches])


def test_rows_hold_the_held_out_text_once_and_its_bytes(folder, tokenizer: Tokenizer) -> None:
    path = folder({f"{i}.txt": f"naïve text number {i} 🙂\n" for i in range(300)})
    mixture = open_sources([str(path)], held_out=0.1)
    texts = [part.text for parts in mixture.sources[0].held_out_documents() for part in parts]
    rows = held_out_rows(mixture, tokenizer, seq_len=50, max_rows=1000, batch_size=4)
    stream = [i for text in texts for i in tokenizer.encode(text, bos=True, eos=True)]
    ids, labels = rows_of(rows, "input_ids_BT").flatten().tolist(), rows_of(rows, "labels_BT").flatten().tolist()
    assert ids[: len(stream)] == stream
    assert labels[: len(stream) - 1] == stream[1:]
    assert set(ids[len(stream) :]) == {tokenizer.pad_id}
    assert set(labels[len(stream) - 1 :]) == {-100}
    assert len(ids) == math.ceil((len(stream) - 1) / 50) * 50
    assert rows.num_labels == len(stream) - 1
    assert rows.num_bytes == sum(len(text.encode()) for text in texts)
    # One bit for each byte, in nats.
    assert rows.bits_per_byte(rows.num_bytes * math.log(2)) == pytest.approx(1)
    assert {len(batch.input_ids_BT) for batch in rows.batches[:-1]} == {4}


def test_a_bound_on_rows_cuts_the_same_rows_short(folder, tokenizer: Tokenizer) -> None:
    path = folder({f"{i}.txt": f"text number {i} " * 5 for i in range(100)})
    mixture = open_sources([str(path)], held_out=0.5)
    long, short = (held_out_rows(mixture, tokenizer, 20, rows) for rows in (50, 3))
    assert torch.equal(rows_of(short, "input_ids_BT"), rows_of(long, "input_ids_BT")[:3])
    assert short.num_labels == 60
    labels = rows_of(short, "labels_BT").flatten().tolist()
    assert short.num_bytes == sum(tokenizer.byte_lengths()[label] for label in labels)


def test_prompts_count_neither_as_labels_nor_as_bytes() -> None:
    tokenizer = Tokenizer.train([], 275)
    mixture = open_sources(["builtin:arithmetic"])
    document = mixture.sources[0].read(0)
    answer = len(document.text) - document.loss_from
    rows = held_out_rows(mixture, tokenizer, seq_len=len(document.text) + 2, max_rows=10)
    assert (rows.num_labels, rows.num_bytes) == (10 * (answer + 1), 10 * answer)


def test_masked_documents_and_mixtures(folder, tokenizer: Tokenizer) -> None:
    path = folder({"a.txt": "the quick fox " * 400, "b.txt": "LAZY DOG " * 400})
    mixture = open_sources([f"{path}/a.txt:1", f"{path}/b.txt:1"], held_out=0.2)
    rows = held_out_rows(mixture, tokenizer, 64, 100, mask_documents=True)
    text = tokenizer.decode(rows_of(rows, "input_ids_BT").flatten().tolist())
    assert "fox" in text
    assert "LAZY" in text
    assert (rows_of(rows, "positions_BT")[rows_of(rows, "input_ids_BT") == tokenizer.bos_id] == 0).all()


def test_data_to_be_evaluated_on_alone(folder, tokenizer: Tokenizer) -> None:
    path = folder({"a.txt": "abc " * 5, "b.txt": "def"})
    rows = held_out_rows(open_sources([str(path)], held_out=1), tokenizer, 16, 64)
    assert rows.num_bytes == 23
    with pytest.raises(UserError, match="no text is held out"):
        held_out_rows(open_sources([str(path)], held_out=0), tokenizer, 16, 64)


def test_a_long_text_is_not_read_to_its_end(folder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder({"a.txt": "word " * 1_500_000})
    mixture = open_sources([str(path)], held_out=1)
    read: list[int] = []
    documents = mixture.sources[0]._documents  # type: ignore[attr-defined]
    original = documents.read
    monkeypatch.setattr(documents, "read", lambda i, part=0: read.append(part) or original(i, part))
    rows = held_out_rows(mixture, tokenizer, 32, 2)
    assert rows.num_labels == 64
    assert max(read) < 3
