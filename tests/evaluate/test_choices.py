"""Log-likelihoods against transformers, whatever is shared, padded, kept from before or cut into windows."""

from __future__ import annotations

import random

import pytest
import torch
from published_models import transformers_model

from fireflyer import load_model
from fireflyer.evaluate.choices import ContinuationScorer, document_logprob, encode_continuation
from fireflyer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module", params=["v3", "v2-lite"])
def both(request, tmp_path_factory):
    reference = transformers_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return load_model(folder), reference


@torch.no_grad()
def reference_logprobs(reference, ids):
    """Of each token after the first."""
    logprobs = reference(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logprobs[place - 1, ids[place]].item() for place in range(1, len(ids))]


def test_choices_against_transformers(both):
    model, reference = both
    draw = random.Random(0)
    scorer = ContinuationScorer(model, 64)
    examples = [0, *(draw.randrange(2, 64) for _ in range(20))]
    for _ in range(4):  # the same examples before each question, which are read once
        context = examples + [draw.randrange(2, 64) for _ in range(draw.randrange(1, 9))]
        choices = [[draw.randrange(2, 64) for _ in range(length)] for length in (1, 1, 5, 12, 3)]
        choices.append(choices[2])
        expected = [sum(reference_logprobs(reference, context + choice)[-len(choice) :]) for choice in choices]
        assert scorer.score(context, choices) == pytest.approx(expected, abs=1e-5 * 12)


def test_a_context_too_long_loses_its_beginning(both):
    model, reference = both
    draw = random.Random(1)
    context, choice = [0, *(draw.randrange(2, 64) for _ in range(90))], [5, 6, 7]
    kept = [0, *context[-60:]]
    (found,) = ContinuationScorer(model, 64).score(context, [choice])
    assert found == pytest.approx(sum(reference_logprobs(reference, kept + choice)[-3:]), abs=1e-4)


@pytest.mark.parametrize("window", [1, 2, 7, 8, 40, 63])
def test_documents_in_windows(both, window):
    """Every token once; each but those of the first window with at least half a window before it."""
    model, reference = both
    draw = random.Random(2)
    tokens = [draw.randrange(2, 64) for _ in range(37)]
    ids = [0, *tokens]
    expected, scored = 0.0, 1
    while scored < len(ids):
        begin = max(0, scored - max(1, window // 2))
        piece = ids[begin : begin + window + 1]
        expected += sum(reference_logprobs(reference, piece)[scored - begin - 1 :])
        scored = begin + len(piece)
    assert document_logprob(model, tokens, 0, window) == pytest.approx(expected, abs=1e-3)
    if window >= len(tokens):
        assert expected == pytest.approx(sum(reference_logprobs(reference, ids)))


def test_where_a_continuation_begins():
    tokenizer = Tokenizer.train(["the answer is A", "the answer is B, and a tail"] * 8, vocab_size=320)
    for context, continuation in (("the answer is", " A"), ("the answer is ", "A"), ("the", " answer"), ("", "the")):
        before, after = encode_continuation(tokenizer, context, continuation)
        assert before[0] == tokenizer.bos_id
        assert tokenizer.decode(before + after) == context + continuation
        assert [*before[1:], *after] == tokenizer.encode(context + continuation)
        assert after
