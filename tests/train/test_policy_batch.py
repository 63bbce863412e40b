"""Trials as rows: where labels, weights and experts stand; and that splitting a batch changes nothing of its loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fireflyer.data.packing import NO_LABEL
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.train.policy_batch import PolicyBatch, Trial, collate
from fireflyer.train.policy_update import PolicyPart, answer_logprobs, policy_part
from fireflyer.train.post_training_settings import GrpoSettings
from tests.tiny_run import tiny_recipe

PAD = 2


def _batch(trials: list[Trial], rule: str = "token") -> PolicyBatch:
    return collate(trials, pad_id=PAD, length_rule=rule, max_tokens=8)  # type: ignore[arg-type]


def test_two_answers_by_hand():
    trials = [Trial([5, 6], [7], [-0.5], 1.5), Trial([5, 6, 8], [9, 10, 11], [-1.0, -2.0, -3.0], -0.5)]
    batch = _batch(trials)
    n = NO_LABEL
    assert batch.input_ids_BT.tolist() == [[5, 6, 8, 9, 10], [5, 6, PAD, PAD, PAD]]
    assert batch.labels_BT.tolist() == [[n, n, 9, 10, 11], [n, 7, n, n, n]]
    assert batch.real_BT.sum(1).tolist() == [5, 2]
    assert batch.old_logprobs_BT[0, 2:].tolist() == [-1, -2, -3]
    assert batch.advantages_BT[0, 2:].tolist() == [-0.5] * 3
    assert batch.advantages_BT[1, 1] == 1.5
    assert batch.weights_BT[0, 2:].tolist() == [0.25] * 3
    assert (batch.weights_BT.sum() - 1).abs() < 1e-6
    assert [part.input_ids_BT.shape for part in batch.parts(1, "cpu")] == [(1, 5), (1, 2)]


def test_an_answer_that_does_not_count_has_no_label_but_weighs_on_the_mean_over_answers():
    batch = _batch([Trial([5], [7, 8], [-1, -1], 1.0, counts=False), Trial([5], [9, 9], [-1, -1], -1.0)], "answer")
    assert (batch.labels_BT[0] == NO_LABEL).all()
    assert batch.weights_BT[1].tolist() == [0.25, 0.25]


def _model() -> Decoder:
    model = Decoder(tiny_recipe("builtin:arithmetic").model.replace(initializer_range=0.2))
    init_weights_(model, torch.Generator().manual_seed(3))
    return model


def _trials(model: Decoder, reference: bool = True) -> list[Trial]:
    draw = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(20, 250, (count,), generator=draw).tolist()

    pairs = [(ids(3 + n % 4), ids(1 + n)) for n in range(7)]
    own = answer_logprobs(model, pairs, rows=3, pad_id=PAD)
    return [
        Trial(prompt, answer, [x + 0.3 * (i % 2) for i, x in enumerate(logp)], (-1.0) ** n, n != 2,
              [x - 0.1 for x in logp] if reference else None)
        for n, ((prompt, answer), logp) in enumerate(zip(pairs, own, strict=True))
    ]  # fmt: skip


def _run(model: Decoder, batch: PolicyBatch, rows: int, settings: GrpoSettings) -> tuple[list[PolicyPart], list]:
    model.zero_grad()
    parts = [policy_part(model.trunk, model, part, settings) for part in batch.parts(rows, "cpu")]
    for part in parts:
        part.terms.loss.backward()
    return parts, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("rule", ["answer", "token", "constant"])
def test_token_means_and_gradients_do_not_depend_on_the_split(rule: str):
    model = _model()
    batch = _batch(_trials(model), rule)
    settings = GrpoSettings(kl_weight=0.2)
    whole, grads = _run(model, batch, 7, settings)
    for rows in (1, 3, 4):
        parts, others = _run(model, batch, rows, settings)
        assert sum(float(p.terms.loss.detach()) for p in parts) == pytest.approx(
            float(whole[0].terms.loss.detach()), abs=1e-6
        )
        assert sum(p.tokens for p in parts) == whole[0].tokens
        assert sum(float(p.entropy) for p in parts) == pytest.approx(float(whole[0].entropy), rel=1e-5)
        assert sum(float(p.terms.kl) for p in parts) == pytest.approx(float(whole[0].terms.kl), rel=1e-4)
        for layer in range(2):
            rows = sum(len(p.routing[layer].indices_NK) for p in parts)
            assert rows == len(whole[0].routing[layer].indices_NK)  # padding is never counted
        for a, b in zip(grads, others, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_padding_is_not_counted_and_answer_logprobs_are_those_of_each_alone():
    model = _model()
    trials = _trials(model)
    part = policy_part(model.trunk, model, _batch(trials), GrpoSettings())
    tokens = sum(len(t.prompt_ids) + len(t.answer_ids) - 1 for t in trials)
    assert [len(layer.indices_NK) for layer in part.routing] == [tokens, tokens]
    pairs = [(t.prompt_ids, t.answer_ids) for t in trials]
    together = answer_logprobs(model, pairs, rows=7, pad_id=PAD)
    for pair, logp in zip(pairs, together, strict=True):
        assert answer_logprobs(model, [pair], rows=1, pad_id=PAD)[0] == pytest.approx(logp, abs=1e-5)


def test_replayed_experts_are_taken_for_the_answers_and_free_for_the_prompts():
    model = _model()
    layers, k = 2, model.config.num_experts_per_tok
    experts = [[[7, 3]] * layers, [[0, 5]] * layers]
    assert k == 2
    trial = Trial([5, 6, 8], [9, 10], [-1.0, -1.0], 1.0, experts=experts)
    shorter = Trial([5], [9], [-1.0], -1.0, experts=experts[:1])
    batch = _batch([trial, shorter])
    assert batch.experts_BTLK is not None
    assert batch.experts_BTLK[0, :, 0].tolist() == [[-1, -1], [-1, -1], [7, 3], [0, 5]]
    assert batch.experts_BTLK[1, :, 1].tolist() == [[7, 3], [-1, -1], [-1, -1], [-1, -1]]
    forced = policy_part(model.trunk, model, batch, GrpoSettings()).routing
    free = policy_part(model.trunk, model, replace(batch, experts_BTLK=None), GrpoSettings()).routing
    assert [layer.layer_index for layer in forced] == [1, 2]
    for layer, other in zip(forced, free, strict=True):
        assert layer.indices_NK[[2, 3, 4]].tolist() == [[7, 3], [0, 5], [7, 3]]
        assert not torch.equal(layer.indices_NK, other.indices_NK)
    assert torch.equal(forced[0].indices_NK[:2], free[0].indices_NK[:2])
