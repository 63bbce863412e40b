"""Which experts a token goes to: a plain loop per token and worked examples are the oracles."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.model.routing import expert_counts, gate_logits, route, stable_top_k


def routing_config(**fields):
    """Just what `route` reads."""
    v3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    return SimpleNamespace(**v3 | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2} | fields)


V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0}


def naive_choice(scores, bias, config):
    """One token: experts from best to worst, lowest index first among equals, from open groups only."""
    choice = [np.float32(s) + np.float32(b) for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // config.n_group
    open_experts = range(len(choice))
    if config.n_group > 1 and config.topk_method != "greedy":
        group_scores = []
        for group in range(config.n_group):
            members = sorted(choice[group * size : (group + 1) * size], reverse=True)
            group_scores.append(members[0] + members[1] if config.topk_method == "noaux_tc" else members[0])
        open_groups = sorted(range(config.n_group), key=lambda g: (-group_scores[g], g))[: config.topk_group]
        open_experts = [e for e in range(len(choice)) if e // size in open_groups]
    return sorted(open_experts, key=lambda e: (-choice[e], e))[: config.num_experts_per_tok]


def naive_scores(logits, scoring_func):
    if scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def naive_weights(logits, chosen, config):
    scores = naive_scores(logits, config.scoring_func)
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return [scores[e] / total * config.routed_scaling_factor for e in chosen]


@st.composite
def routing_cases(draw):
    """Coarse logits and biases, so that equals abound, among experts and among groups; biases mostly negative."""
    method = draw(st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]))
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    experts = groups * size
    per_token = draw(st.integers(1, experts if method == "greedy" else topk_group * size))
    fields = {"n_group": groups, "topk_group": topk_group, "num_experts_per_tok": per_token, "topk_method": method}
    row = st.lists(st.integers(-4, 4).map(lambda n: n / 2), min_size=experts, max_size=experts)
    logits = draw(st.lists(row, min_size=1, max_size=5))
    bias = [0.0] * experts
    if method == "noaux_tc":
        bias = draw(st.lists(st.integers(-12, 1).map(lambda n: n / 4), min_size=experts, max_size=experts))
        return routing_config(**fields), logits, bias
    return routing_config(**V2 | fields), logits, bias


@settings(max_examples=300)
@given(case=routing_cases())
def test_route_equals_a_loop_per_token(case):
    config, logits, bias = case
    bias_E = torch.tensor(bias) if config.topk_method == "noaux_tc" else None
    indices_NK, weights_NK, scores_NE = route(torch.tensor(logits), bias_E, config)
    assert weights_NK.dtype == scores_NE.dtype == torch.float32
    for n, row in enumerate(logits):
        expected = torch.tensor(naive_scores(row, config.scoring_func))
        torch.testing.assert_close(scores_NE[n], expected, rtol=1e-6, atol=0)
        # The choice is made of these very fp32 scores: rounding is not this test's matter.
        chosen = naive_choice(scores_NE[n].tolist(), bias, config)
        assert indices_NK[n].tolist() == chosen
        torch.testing.assert_close(weights_NK[n], torch.tensor(naive_weights(row, chosen, config)), rtol=1e-5, atol=0)


def test_v3_by_hand():
    """Scores .9 .5 | .75 .2 | .25 .5, biased -.1 -.5 | .25 -.1 | .15 .3: the groups count -.6, .15 and .45.

    Groups 2 and 1 are open. Of theirs the order is expert 5 (.3), 2 (.25), 4 (.15), 3 (-.1). Filling closed groups
    with 0 would choose expert 0 before 3; the best of a group instead of the sum of two would rank alike. The unbiased
    scores .5 + .75 + .25 + .2 = 1.7, so the weights are 2.5 · .5 / 1.7 and so on.
    """
    scores = torch.tensor([[0.9, 0.5, 0.75, 0.2, 0.25, 0.5]])
    bias = torch.tensor([-1.0, -1.0, -0.5, -0.3, -0.1, -0.2])
    config = routing_config(n_group=3, topk_group=2, num_experts_per_tok=4)
    indices, weights, unbiased = route(scores.logit(), bias, config)
    assert indices.tolist() == [[5, 2, 4, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.7352941, 1.1029412, 0.3676471, 0.2941176]]))
    torch.testing.assert_close(unbiased, scores)


def test_v2_by_hand():
    """Softmax .30 .02 | .20 .22 | .25 .01, the groups count .30, .22 and .25 (sums of two: .32, .42, .26).

    Groups 0 and 2 are open: experts 0, 4, 1, weighted 16 times their probability, not renormalised.
    """
    probabilities = torch.tensor([[0.30, 0.02, 0.20, 0.22, 0.25, 0.01]])
    grouped = routing_config(**V2, topk_method="group_limited_greedy", n_group=3, topk_group=2, num_experts_per_tok=3)
    indices, weights, scores = route(probabilities.log(), None, grouped)
    assert indices.tolist() == [[0, 4, 1]]
    torch.testing.assert_close(weights, torch.tensor([[4.80, 4.00, 0.32]]))
    torch.testing.assert_close(scores, probabilities)
    # V2-Lite has no groups, whatever their number says.
    greedy = routing_config(**V2, topk_method="greedy", n_group=3, topk_group=2, num_experts_per_tok=3)
    assert route(probabilities.log(), None, greedy)[0].tolist() == [[0, 4, 3]]


def test_a_group_counts_by_its_two_best_not_its_best():
    scores = torch.tensor([[0.9, 0.1, 0.1, 0.6, 0.6, 0.1]])
    config = routing_config(n_group=2, topk_group=1, num_experts_per_tok=2)
    assert route(scores.logit(), torch.zeros(6), config)[0].tolist() == [[3, 4]]


def test_no_expert_of_a_closed_group_whatever_the_bias():
    """All biased scores negative: a closed group filled with 0 would win."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 32, generator=generator)
    bias = -5 - torch.rand(32, generator=generator)
    config = routing_config(n_group=8, topk_group=2, num_experts_per_tok=8)
    indices, _, scores = route(logits, bias, config)
    assert (scores + bias < 0).all()
    for chosen in indices.tolist():
        assert len({expert // 4 for expert in chosen}) == 2
        assert len(set(chosen)) == 8


def test_ties_go_to_the_lowest_index():
    """Among experts and among groups; 300 equals, where an unstable sort shows."""
    assert stable_top_k(torch.zeros(2, 300), 300).tolist() == [list(range(300))] * 2
    config = routing_config(n_group=50, topk_group=3, num_experts_per_tok=18)
    indices, _, _ = route(torch.zeros(4, 300), torch.zeros(300), config)
    assert indices.tolist() == [list(range(18))] * 4


def test_bias_steers_the_choice_and_nothing_else():
    logits = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(16)
    bias[3] = 10.0
    config = routing_config(num_experts_per_tok=4)
    plain_indices, _, plain_scores = route(logits, torch.zeros(16), config)
    indices, weights, scores = route(logits, bias, config)
    assert (indices[:, 0] == 3).all()
    assert not (plain_indices[:, 0] == 3).all()
    assert torch.equal(scores, plain_scores)
    torch.testing.assert_close(weights.sum(-1), torch.full((64,), 2.5))
    torch.testing.assert_close(weights[:, 0], 2.5 * scores[:, 3] / scores.gather(1, indices).sum(-1))


def test_scores_that_all_underflow_give_zero_weights_and_gradients():
    logits = torch.full((2, 8), -200.0, requires_grad=True)
    _, weights, scores = route(logits, torch.zeros(8), routing_config())
    assert (scores == 0).all()
    assert (weights == 0).all()
    weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("fields", [{}, V2 | {"topk_method": "greedy"}])
def test_the_gradient_reaches_the_gate_through_the_chosen_weights(fields):
    """Against finite differences; a score that isn't chosen moves nothing in V3."""
    config = routing_config(**fields)
    logits = torch.tensor([[0.3, -0.2, 1.0, 0.1]], requires_grad=True)
    mix = torch.tensor([[0.7, -1.3]])
    (route(logits, None, config)[1] * mix).sum().backward()
    for expert in range(4):
        moved = torch.tensor([0.0] * 4)
        moved[expert] = 1e-2
        with torch.no_grad():
            up, down = (float((route(logits + sign * moved, None, config)[1] * mix).sum()) for sign in (1, -1))
        assert logits.grad is not None
        assert float(logits.grad[0, expert]) == pytest.approx((up - down) / 2e-2, rel=2e-3, abs=2e-4)


def test_expert_counts():
    counts = expert_counts(torch.tensor([[0, 2], [2, 3], [2, 0]]), 5)
    assert counts.tolist() == [2, 0, 3, 1, 0]
    assert counts.dtype == torch.int64


def test_gate_logits_are_fp32_even_under_autocast_and_in_a_bf16_model():
    """1 + 2⁻¹² vanishes in bf16, and with it the difference between these two experts."""
    x = torch.ones(1, 2)
    weight = torch.tensor([[1.0, 0.0], [1.0, 2.0**-12]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate_logits(x, weight)
    assert logits.dtype == torch.float32
    assert logits[0, 1] - logits[0, 0] == 2.0**-12
    half = gate_logits(x.bfloat16(), weight.bfloat16())
    assert half.dtype == torch.float32
    assert half[0, 1] - half[0, 0] == 2.0**-12


def test_forced_experts_replace_the_choice_and_nothing_else():
    config = routing_config(n_group=2, topk_group=1)
    logits, bias = torch.randn(5, 8), torch.randn(8)
    free, weights, scores = route(logits, bias, config)
    forced = torch.tensor([[7, 0], [-1, -1], [3, 4], [-1, -1], [1, 6]])
    chosen, forced_weights, same_scores = route(logits, bias, config, forced_NK=forced)
    assert chosen.tolist() == [[7, 0], free[1].tolist(), [3, 4], free[3].tolist(), [1, 6]]
    assert torch.equal(same_scores, scores)
    for row in (0, 2, 4):
        expected = naive_weights(logits[row].tolist(), chosen[row].tolist(), config)
        torch.testing.assert_close(forced_weights[row], torch.tensor(expected))
    assert torch.equal(forced_weights[[1, 3]], weights[[1, 3]])
