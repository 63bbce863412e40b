"""GRPO's objective: a gradient by hand, the KL estimate's properties, the chunked log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fireflyer.train import policy
from fireflyer.train.advantages import token_weights
from fireflyer.train.policy import chosen_logprobs, kl_estimate, policy_terms
from fireflyer.train.post_training_settings import LengthRule


def _terms(logp: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, **more: object) -> policy.PolicyTerms:
    return policy_terms(logp, old, advantage, weight, clip_low=0.2, clip_high=0.2, **more)  # type: ignore[arg-type]


def test_two_tokens_by_hand():
    # pi is 0.3 and 0.5, pi_old 0.25 and 0.5; ratios 1.2 (not above the clip) and 1.
    logp = torch.tensor([math.log(0.3), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([math.log(0.25), math.log(0.5)], dtype=torch.float64)
    ref = torch.tensor([math.log(0.6), math.log(0.5)], dtype=torch.float64)
    advantage, weight = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 0.25]).double()
    terms = policy_terms(logp, old, advantage, weight, clip_low=0.2, clip_high=0.3, ref_logp_N=ref, kl_weight=0.1)
    kl = 2 - math.log(2) - 1
    assert terms.loss.item() == pytest.approx(-(0.5 * (1.2 - 0.1 * kl) + 0.25 * (1.0 * -2.0)), abs=1e-12)
    terms.loss.backward()
    # d ratio / d log pi = ratio; d KL / d log pi = 1 - r, which is 1 - 2 for the first token and 0 for the second.
    assert logp.grad is not None
    expected = [-0.5 * (1.2 * 1.0 - 0.1 * (1 - 2)), -0.25 * (1.0 * -2.0)]
    assert logp.grad.tolist() == pytest.approx(expected, abs=1e-12)
    assert terms.kl.item() == pytest.approx(kl)
    assert terms.gap.item() == pytest.approx(math.log(1.2))
    assert terms.gap_max.item() == pytest.approx(math.log(1.2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [(1.1, 1.0, 1.1), (1.31, 1.0, 0.0), (1.31, -1.0, -1.31), (0.7, 1.0, 0.7), (0.7, -1.0, 0.0), (0.9, -1.0, -0.9)],
)
def test_the_clip_cuts_only_what_has_gone_far_enough(ratio: float, advantage: float, slope: float):
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    terms = policy_terms(logp, torch.zeros(1), torch.tensor([advantage]), torch.ones(1), clip_low=0.2, clip_high=0.3)
    terms.loss.backward()
    assert logp.grad is not None
    assert -logp.grad.item() == pytest.approx(slope)
    assert terms.clipped.item() == (slope == 0)


def test_kl_is_never_negative_and_zero_at_the_reference():
    logp = torch.randn(1000).double()
    assert (kl_estimate(logp, logp) == 0).all()
    assert (kl_estimate(logp, torch.randn(1000).double()) >= 0).all()


def test_the_estimates_mean_is_the_divergence():
    policy_p, ref_p = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    exact = (policy_p * (policy_p / ref_p).log()).sum()
    torch.testing.assert_close((policy_p * kl_estimate(policy_p.log(), ref_p.log())).sum(), exact)


@pytest.mark.parametrize("rule", ["answer", "token", "constant"])
def test_the_loss_does_not_depend_on_how_a_batch_is_split(rule: LengthRule):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 7, 0, 5])
    tokens = int(lengths.sum())
    logp, old, ref = (torch.rand(tokens, generator=draw).double().log() for _ in range(3))
    answer_of = torch.arange(5).repeat_interleave(lengths)
    advantage = torch.randn(5, generator=draw).double()[answer_of]
    weight = token_weights(lengths, rule, 8)[answer_of]
    whole = _terms(logp, old, advantage, weight, ref_logp_N=ref, kl_weight=0.3)
    for sizes in ([3, 13], [8, 8], [1, 2, 10, 3], [16]):
        parts = [
            _terms(*part[:4], ref_logp_N=part[4], kl_weight=0.3)
            for part in zip(*(x.split(sizes) for x in (logp, old, advantage, weight, ref)), strict=True)
        ]
        torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
        assert sum(int(part.clipped) for part in parts) == int(whole.clipped)


@pytest.mark.parametrize("chunk", [1 << 22, 40, 7])
def test_chosen_logprobs_are_those_of_plain_torch(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(policy, "_CHUNK_ELEMENTS", chunk)
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    ids, factor = torch.randint(0, 11, (9,), generator=draw), torch.randn(9, generator=draw, dtype=torch.float64)
    logp, entropy = chosen_logprobs(hidden, weight, ids)
    (logp * factor).sum().backward()
    got = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    log_p = (hidden @ weight.T).log_softmax(-1)
    own = log_p[torch.arange(9), ids]
    (own * factor).sum().backward()
    torch.testing.assert_close(logp, own)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(got, (hidden.grad, weight.grad))
    assert not entropy.requires_grad


def test_no_token_is_no_loss():
    empty = torch.zeros(0)
    terms = _terms(empty, empty, empty, empty)
    assert terms.loss == terms.gap == terms.gap_max == 0
