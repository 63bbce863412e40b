"""Acceptance of MTP drafts against a token-by-token draft, and the measured matrix product rate."""

import time

import torch

from fireflyer.config import ModelConfig
from fireflyer.data.packing import NO_LABEL, Batch
from fireflyer.evaluate.machine import measure_matmul_flops_per_s, measure_read_bytes_per_s
from fireflyer.evaluate.speculation import draft_agreement, mtp_acceptance
from fireflyer.model.decoder import Decoder, init_weights_

_SHAPE = {
    "vocab_size": 12,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "routed_scaling_factor": 1.0,
    "initializer_range": 0.3,
}


def _model(num_mtp: int) -> Decoder:
    model = Decoder(ModelConfig.from_dict(_SHAPE | {"num_nextn_predict_layers": num_mtp}, source="test"))
    init_weights_(model, torch.Generator().manual_seed(1))
    return model


def _naive_acceptance(model: Decoder, sequences: list[tuple[list[int], int]]) -> float:
    """One draft at a time: show the tokens up to the one before, take depth 1's last row."""
    hits = []
    for ids, prompt_length in sequences:
        for place in range(prompt_length + 1, len(ids)):
            with torch.no_grad():
                drafts = model(torch.tensor([ids[:place]])).mtp_logits[0][0, -1]
            hits.append(int(drafts.argmax()) == ids[place])
    return sum(hits) / len(hits)


def test_acceptance_counts_the_drafts_that_were_said():
    model = _model(1)
    generator = torch.Generator().manual_seed(0)
    sequences = [(torch.randint(0, 12, (n,), generator=generator).tolist(), p) for n, p in ((9, 3), (14, 6), (20, 1))]
    # Random tokens are rarely what a model would draft: half of them are taken from its own drafts.
    for ids, prompt_length in sequences:
        for place in range(prompt_length + 1, len(ids), 2):
            with torch.no_grad():
                ids[place] = int(model(torch.tensor([ids[:place]])).mtp_logits[0][0, -1].argmax())
    acceptance = mtp_acceptance(model, sequences)
    assert acceptance == _naive_acceptance(model, sequences)
    assert acceptance is not None
    assert 0.4 < acceptance < 1


def test_no_acceptance_without_drafts():
    assert mtp_acceptance(_model(0), [([1, 2, 3, 4], 1)]) is None
    assert mtp_acceptance(_model(1), [([1, 2, 3, 4], 3)]) is None


def test_the_matrix_product_rate_is_of_this_machine():
    rate = measure_matmul_flops_per_s(size=256, seconds=0.02)
    assert 1e8 < rate < 1e14


def test_the_reading_rate_is_of_this_machine():
    buffer = torch.ones(2**24)
    begun = time.perf_counter()
    for _ in range(4):
        buffer.clone()  # reads each byte, and writes it too: slower than reading alone, but by less than ten
    copied = 4 * buffer.nbytes / (time.perf_counter() - begun)
    assert copied / 4 < measure_read_bytes_per_s(gib=1 / 16, seconds=0.05) < copied * 40


def test_agreement_is_counted_position_by_position() -> None:
    model = _model(1)
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(12, (3, 20), generator=draw)
    labels = torch.where(torch.rand(3, 20, generator=draw) < 0.3, NO_LABEL, ids.roll(-1, 1))
    positions = torch.arange(20).expand(3, 20)
    hits = []
    for row in range(3):
        for place in range(1, 20):
            if labels[row, place] != NO_LABEL:
                with torch.no_grad():
                    out = model(ids[row : row + 1, : place + 1])
                hits.append(int(out.mtp_logits[0][0, place - 1].argmax()) == int(out.logits[0, place].argmax()))
    batch = Batch(ids, labels, positions, torch.zeros_like(ids))
    assert draft_agreement(model, batch) == sum(hits) / len(hits)
    assert 0 < sum(hits) < len(hits)
    nothing = Batch(ids, torch.full_like(ids, NO_LABEL), positions, torch.zeros_like(ids))
    assert draft_agreement(model, nothing) is None
    assert draft_agreement(_model(0), batch) is None
