"""Held-out loss and bits per byte against sums over single tokens of the real text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_run import tiny_recipe, write_text

from fireflyer.data.held_out import held_out_rows
from fireflyer.data.mixture import open_sources
from fireflyer.evaluate import likelihood
from fireflyer.evaluate.likelihood import held_out_likelihood
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(tiny_recipe("absent").model.replace(initializer_range=0.3))
    init_weights_(model, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_elements", [1, 1 << 22])
def test_against_single_tokens(
    masked: bool, chunk_elements: int, model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every label once: log-softmax of the logits at its position; bytes counted from the decoded labels."""
    monkeypatch.setattr(likelihood, "_CHUNK_ELEMENTS", chunk_elements)
    mixture = open_sources([str(write_text(tmp_path / "text.jsonl", 60))], held_out=0.3)
    tokenizer = Tokenizer.train(mixture.sample_texts(0), 300)
    rows = held_out_rows(mixture, tokenizer, 24, 5, batch_size=2, mask_documents=masked)
    scored = held_out_likelihood(model, rows, mask_documents=masked)
    total, labels, num_bytes = 0.0, 0, 0
    with torch.no_grad():
        for batch in rows.batches:
            documents = batch.document_ids_BT if masked else None
            logits = model(batch.input_ids_BT, positions=batch.positions_BT, document_ids=documents).logits.double()
            for b, row in enumerate(batch.labels_BT.tolist()):
                for i, label in enumerate(row):
                    if label != -100:
                        total -= float(logits[b, i].log_softmax(-1)[label])
                        labels += 1
                        num_bytes += len(tokenizer.token_bytes(label))
    assert labels > 50
    assert scored.loss == pytest.approx(total / labels, rel=1e-5)
    assert scored.bits_per_byte == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)


def test_a_uniform_guess_costs_log_v(model: Decoder, tmp_path: Path):
    flat = Decoder(model.config)
    init_weights_(flat, torch.Generator().manual_seed(0))
    with torch.no_grad():
        flat.head_weight.zero_()
    mixture = open_sources([str(write_text(tmp_path / "text.jsonl", 60))], held_out=0.3)
    tokenizer = Tokenizer.train(mixture.sample_texts(0), 300)
    rows = held_out_rows(mixture, tokenizer, 24, 5)
    assert held_out_likelihood(flat, rows).loss == pytest.approx(math.log(300))


def test_no_gradient_and_no_random_number_is_used(model: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(Decoder, "head", lambda self, hidden: seen.append(hidden) or F.linear(hidden, self.head_weight))
    mixture = open_sources([str(write_text(tmp_path / "text.jsonl", 60))], held_out=0.3)
    rows = held_out_rows(mixture, Tokenizer.train(mixture.sample_texts(0), 300), 24, 5)
    before, rng = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    held_out_likelihood(model, rows)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert seen
    assert not any(hidden.requires_grad for hidden in seen)  # or the whole forward would be kept in memory
