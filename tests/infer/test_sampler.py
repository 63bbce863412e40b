"""The sampler against loops that follow each definition word by word, and against the expected counts (chi-square)."""

import math

import pytest
import torch

from fireflyer.errors import UserError
from fireflyer.infer import sampler
from fireflyer.infer.sampler import Sampler, draw, filter_min_p, filter_top_k, filter_top_p
from fireflyer.infer.sampling_params import SamplingParams


def softmax(logits):
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def by_probability(logits):
    """Tokens by falling logit, equal ones by rising id."""
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def naive_top_k(logits, k):
    return set(range(len(logits))) if k <= 0 else set(by_probability(logits)[:k])


def naive_top_p(logits, p):
    probabilities, kept, mass = softmax(logits), set(), 0.0
    for token in by_probability(logits):
        if kept and mass >= p:
            break
        kept.add(token)
        mass += probabilities[token]
    return kept


def naive_min_p(logits, p):
    probabilities = softmax(logits)
    return {token for token, share in enumerate(probabilities) if share >= p * max(probabilities)}


def kept(filtered_V):
    return set(torch.isfinite(filtered_V).nonzero()[:, 0].tolist())


def random_logits(rows, vocab_size, seed):
    """Distinct values: the order of all tokens is certain, and no sum lies at the edge of a threshold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * 3


@pytest.mark.parametrize(
    ("function", "naive", "values", "dtype"),
    [
        (filter_top_k, naive_top_k, [0, 1, 2, 7, 50, 1000], torch.int64),
        (filter_top_p, naive_top_p, [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0], torch.float64),
        (filter_min_p, naive_min_p, [0.0, 0.01, 0.1, 0.5, 0.9, 1.0], torch.float32),
    ],
)
def test_filters_match_their_definitions(function, naive, values, dtype):
    logits_BV = random_logits(len(values), 50, seed=1)
    filtered_BV = function(logits_BV, torch.tensor(values, dtype=dtype))
    for row, value in enumerate(values):
        assert kept(filtered_BV[row]) == naive(logits_BV[row].tolist(), value), value
        assert torch.equal(filtered_BV[row, list(kept(filtered_BV[row]))], logits_BV[row, list(kept(filtered_BV[row]))])


def test_equal_tokens_are_kept_by_id_and_no_more_than_asked():
    logits_BV = torch.zeros(1, 8)
    assert kept(filter_top_k(logits_BV, torch.tensor([3]))[0]) == {0, 1, 2}
    assert kept(filter_top_p(logits_BV, torch.tensor([0.5], dtype=torch.float64))[0]) == {0, 1, 2, 3}
    logits_BV[0, 5] = 1.0
    assert kept(filter_top_k(logits_BV, torch.tensor([3]))[0]) == {0, 1, 5}


def test_nucleus_wider_than_the_fast_path(monkeypatch):
    """A row whose nucleus does not fit the first try, beside one whose nucleus does."""
    logits_BV = torch.cat((random_logits(1, 300, seed=2), torch.linspace(0, 0.01, 300)[None]))
    top_p_B = torch.tensor([0.5, 0.9], dtype=torch.float64)
    whole = filter_top_p(logits_BV, top_p_B)
    monkeypatch.setattr(sampler, "_NUCLEUS_WIDTH", 64)
    assert torch.equal(filter_top_p(logits_BV, top_p_B), whole)
    for row in range(2):
        assert kept(whole[row]) == naive_top_p(logits_BV[row].tolist(), float(top_p_B[row]))


def test_filters_follow_each_other():
    """Temperature, min-p, top-k, top-p: the nucleus is that of what top-k has left."""
    logits = [3.0, 2.9, 2.8, 2.7, 0.0, -1.0]
    params = SamplingParams(temperature=2.0, min_p=0.3, top_k=3, top_p=0.6)
    filtered = Sampler([params]).filtered(torch.tensor([logits]))[0]
    scaled = [logit / 2.0 for logit in logits]
    left = sorted(naive_min_p(scaled, 0.3) & naive_top_k(scaled, 3))
    nucleus = {left[index] for index in naive_top_p([scaled[token] for token in left], 0.6)}
    assert kept(filtered) == nucleus
    assert len(nucleus) == 2


def chi_square_limit(freedom):
    """The value exceeded once in 10,000 (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.02),
    ],
)
def test_draws_have_the_filtered_distribution(params):
    logits = (random_logits(1, 24, seed=3)[0] / 2).tolist()
    scaled = [logit / params.temperature for logit in logits]
    left = naive_min_p(scaled, params.min_p) & naive_top_k(scaled, params.top_k)
    ordered = sorted(left)
    nucleus = sorted(ordered[index] for index in naive_top_p([scaled[token] for token in ordered], params.top_p))
    expected = dict(zip(nucleus, softmax([scaled[token] for token in nucleus]), strict=True))

    num_draws = 20_000
    uniforms = torch.rand(num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).tolist()
    tokens = Sampler([params] * num_draws)(torch.tensor(logits).expand(num_draws, -1), uniforms)
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts) <= set(nucleus)
    chi_square = sum((counts.get(t, 0) - num_draws * p) ** 2 / (num_draws * p) for t, p in expected.items())
    assert chi_square < chi_square_limit(len(nucleus) - 1)


def test_draw_inverts_the_distribution_and_never_takes_what_is_filtered_out():
    logits_BV = torch.tensor([-math.inf, 0.0, -math.inf, math.log(3.0), -math.inf]).expand(5, -1)
    uniform_B = torch.tensor([0.0, 0.2499, 0.2501, 0.999, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits_BV, uniform_B).tolist() == [1, 1, 3, 3, 3]


def test_draw_reaches_every_rare_token_of_a_large_vocabulary():
    """One token of 99.9% and 129,279 that share the rest: points as far apart as one share fall on as many tokens."""
    rest = 129_279
    logits_V = torch.zeros(rest + 1)
    logits_V[0] = math.log(999 * rest)
    uniform_B = 1 - (torch.arange(100, dtype=torch.float64) + 0.5) * 0.001 / rest
    tokens = draw(logits_V.expand(100, -1), uniform_B).tolist()
    assert len(set(tokens)) >= 99
    assert min(tokens) > rest - 200


@pytest.mark.parametrize(("temperature", "token"), [(1e-37, 0), (1e-320, 0), (1e37, 2), (1e300, 2)])
def test_extreme_temperatures(temperature, token):
    """Down to where fp32 holds no such number: the coldest takes the maximum, the hottest takes all alike."""
    logits_BV = torch.tensor([[1e4, 1e4 - 1e-2, -1e4, -math.inf]])
    params = SamplingParams(temperature=temperature, top_k=3)
    assert Sampler([params])(logits_BV, [0.9]) == [token]


def test_a_row_does_not_depend_on_its_neighbours():
    """Greedy and sampled rows, each filter on in some rows only: as each row alone."""
    rows = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_k=4),
        SamplingParams(temperature=0),
        SamplingParams(temperature=2.0, min_p=0.05),
        SamplingParams(),
    ]
    logits_BV = random_logits(len(rows), 3000, seed=5)
    uniforms = [0.1, 0.93, 0.5, 0.77]
    together = Sampler(rows)(logits_BV.clone(), uniforms)
    left = list(uniforms)
    for row, params in enumerate(rows):
        own = [] if params.greedy else [left.pop(0)]
        assert Sampler([params])(logits_BV[row : row + 1].clone(), own) == [together[row]]
    assert together[0] == int(logits_BV[0].argmax())


def test_logits_that_are_not_finite_are_told():
    logits_BV = torch.zeros(2, 5)
    logits_BV[1, 2] = math.nan
    with pytest.raises(UserError, match="not finite"):
        Sampler([SamplingParams(temperature=0)] * 2)(logits_BV, [])
