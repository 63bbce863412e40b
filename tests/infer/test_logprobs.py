"""Log-probabilities against Python's own logarithms, token by token."""

import json
import math

import pytest
import torch

from fireflyer.infer import logprobs
from fireflyer.infer.logprobs import LOWEST_LOGPROB, token_logprobs
from fireflyer.infer.sampler import Sampler
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SampleRow, SamplingState


def naive(logits):
    """(log-probability, rank) of each token: ranks by falling logit, equal ones by rising id."""
    total = math.log(math.fsum(math.exp(logit - max(logits)) for logit in logits)) + max(logits)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    return [(logit - total, order.index(token) + 1) for token, logit in enumerate(logits)]


@pytest.mark.parametrize("rows_at_once", [1, 3, 100])
def test_match_their_definition_in_order(monkeypatch, rows_at_once):
    """The chosen token first, then the most probable ones by rank; ties too; the same however many rows at once."""
    monkeypatch.setattr(logprobs, "_ELEMENTS", rows_at_once * 50)
    logits_RV = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)) * 3
    logits_RV[3] = logits_RV[3].round()
    logits_RV[4] = 0
    chosen, num_top = [0, 7, 49, 20, 30, 5, 6, 7], [0, 1, 2, 5, 3, 50, 1000, -1]
    for row, entries in enumerate(token_logprobs(logits_RV, chosen, num_top, 50, None)):
        expected = naive(logits_RV[row].tolist())
        count = 50 if num_top[row] < 0 else min(num_top[row], 50)
        by_rank = sorted(range(50), key=lambda token: expected[token][1])[:count]
        assert list(entries) == list(dict.fromkeys([chosen[row], *by_rank]))
        for token, entry in entries.items():
            assert entry.logprob == pytest.approx(expected[token][0], abs=1e-5)
            assert (entry.rank, entry.decoded_token) == (expected[token][1], "")


def test_are_of_the_models_own_distribution(tokenizer):
    """Whatever is done to the logits to choose a token, and padding counts in the sum but has no rank."""
    vocab_size = tokenizer.vocab_size
    logits_1M = torch.randn(1, vocab_size + 20, generator=torch.Generator().manual_seed(2))
    logits_1M[0, vocab_size:] = -9.0
    logits_1M[0, vocab_size + 3] = 9.0
    params = SamplingParams(temperature=0, logit_bias={40: 100}, repetition_penalty=2.0, logprobs=3)
    state = SamplingState(params, prompt_token_ids=[40, 41])
    (sampled,) = Sampler(vocab_size, tokenizer)([SampleRow(state)], logits_1M)
    assert sampled.token_id == 40
    assert sampled.logprobs is not None
    assert next(iter(sampled.logprobs)) == 40
    assert len(sampled.logprobs) == 4
    expected = naive(logits_1M[0].tolist())
    for token, entry in sampled.logprobs.items():
        assert entry.logprob == pytest.approx(expected[token][0], abs=1e-5)
        assert entry.rank == expected[token][1] - 1  # the padded maximum stands before each of them
        assert entry.decoded_token == tokenizer.token_text(token)


def test_prompt_logprobs_take_any_token_of_the_model(tokenizer):
    vocab_size = tokenizer.vocab_size
    logits_TM = torch.randn(3, vocab_size + 20, generator=torch.Generator().manual_seed(3))
    token_ids = [5, vocab_size + 4, 6]
    found = Sampler(vocab_size, tokenizer).prompt_logprobs(logits_TM, token_ids, 2)
    for row, token in enumerate(token_ids):
        assert found[row][token].logprob == pytest.approx(naive(logits_TM[row].tolist())[token][0], abs=1e-5)
        assert len(found[row]) in (2, 3)
    assert found[1][token_ids[1]].decoded_token == ""


@pytest.mark.parametrize("value", [-math.inf, -1e30, math.nan, math.inf])
def test_json_can_hold_them(value):
    logits_1V = torch.zeros(1, 6)
    logits_1V[0, 2] = value
    (entries,) = token_logprobs(logits_1V, [2], [6], 6, None)
    assert len(entries) == 6
    json.dumps([entry.logprob for entry in entries.values()], allow_nan=False)
    if value < 0:
        assert entries[2].logprob == LOWEST_LOGPROB
        assert entries[2].rank == 6
