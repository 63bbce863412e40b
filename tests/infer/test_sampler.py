"""The sampler against loops that follow each definition word by word, and against the expected counts (chi-square)."""

import dataclasses
import math

import pytest
import torch

from fireflyer.infer.sampler import Sampler, draw, draw_filtered, scale_temperature
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SampleRow, SamplingState


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


def state_of(prompt=(), answer=(), end=(), **params):
    state = SamplingState(SamplingParams(**params), prompt_token_ids=prompt, end_token_ids=frozenset(end))
    for token in answer:
        state.commit(token)
    return state


def sample(rows, logits_RV):
    return [token.token_id for token in Sampler(logits_RV.shape[-1])(rows, logits_RV)]


def random_logits(rows, vocab_size, seed):
    """Distinct values: the order of all tokens is certain, and no sum lies at the edge of a threshold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * 3


def naive_kept(logits, params):
    """Temperature, then each filter on what the one before has left."""
    logits = [logit / params.temperature for logit in logits]
    left = sorted(naive_min_p(logits, params.min_p) & naive_top_k(logits, params.top_k))
    return {left[index] for index in naive_top_p([logits[token] for token in left], params.top_p)}


def kept(logits, params):
    """The tokens that evenly spaced numbers draw."""
    logits_1V = torch.tensor([logits])
    probabilities_1V = scale_temperature(logits_1V, torch.tensor([params.temperature])).softmax(-1)
    uniform_B = torch.arange(4000, dtype=torch.float64) / 4000
    return set(draw_filtered(probabilities_1V.expand(4000, -1), [params] * 4000, uniform_B).tolist())


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("top_k", [0, 1, 2, 7, 50, 1000]),
        ("top_p", [1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
        ("min_p", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0]),
    ],
)
def test_filters_match_their_definitions(field, values):
    for seed, value in enumerate(values):
        logits = (random_logits(1, 50, seed)[0] / 3).tolist()
        params = SamplingParams(**{field: value})
        assert kept(logits, params) == naive_kept(logits, params), value


def test_filters_follow_each_other():
    """Temperature, min-p, top-k, top-p: the nucleus is that of what top-k has left."""
    logits = [3.0, 2.9, 2.8, 2.7, 0.0, -1.0]
    params = SamplingParams(temperature=2.0, min_p=0.3, top_k=3, top_p=0.6)
    assert kept(logits, params) == naive_kept(logits, params)
    assert len(kept(logits, params)) == 2
    assert len(kept(logits, dataclasses.replace(params, top_k=0))) == 3
    # Shares 0.5, 0.3, 0.1, 0.1: of the 0.8 that min-p leaves, the first token is more than 0.6.
    logits = [math.log(share) for share in (0.5, 0.3, 0.1, 0.1)]
    assert kept(logits, SamplingParams(min_p=0.5, top_p=0.6)) == {0}
    assert kept(logits, SamplingParams(top_p=0.6)) == {0, 1}


def test_equal_tokens_are_kept_by_id_and_no_more_than_asked():
    assert kept([0.0] * 8, SamplingParams(top_k=3)) == {0, 1, 2}
    assert kept([0.0] * 8, SamplingParams(top_p=0.5)) == {0, 1, 2, 3}
    assert kept([0.0] * 8, SamplingParams(min_p=1.0)) == set(range(8))
    logits = [0.0, 0.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert kept(logits, SamplingParams(top_k=3)) == {0, 1, 5}
    assert kept(logits, SamplingParams(min_p=0.3)) == {0, 1, 3, 4, 5, 6, 7}


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
    nucleus = sorted(naive_kept(logits, params))
    shares = softmax([logits[token] / params.temperature for token in nucleus])
    expected = dict(zip(nucleus, shares, strict=True))

    num_draws = 20_000
    rows = [SampleRow(SamplingState(dataclasses.replace(params, seed=seed))) for seed in range(num_draws)]
    tokens = sample(rows, torch.tensor(logits).expand(num_draws, -1))
    counts = {token: tokens.count(token) for token in set(tokens)}
    assert set(counts) <= set(nucleus)
    chi_square = sum((counts.get(t, 0) - num_draws * p) ** 2 / (num_draws * p) for t, p in expected.items())
    assert chi_square < chi_square_limit(len(nucleus) - 1)


@pytest.mark.parametrize("top_k", [0, 4])
def test_draw_inverts_the_distribution_and_never_takes_what_has_no_share(top_k):
    probabilities_BV = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).expand(5, -1)
    uniform_B = torch.tensor([0.0, 0.2499, 0.2501, 0.7501, 1 - 2**-53], dtype=torch.float64)
    assert draw(probabilities_BV, uniform_B).tolist() == [1, 1, 3, 3, 3]
    # Filters draw from the most probable token on.
    params = [SamplingParams(top_k=top_k, top_p=0.9999)] * 5
    assert draw_filtered(probabilities_BV, params, uniform_B).tolist() == [3, 3, 3, 1, 1]


def test_draw_reaches_every_rare_token_of_a_large_vocabulary():
    """One token of 99.9% and 129,279 that share the rest: points as far apart as one share fall on as many tokens."""
    rest = 129_279
    probabilities_V = torch.full((rest + 1,), 0.001 / rest)
    probabilities_V[0] = 0.999
    uniform_B = 1 - (torch.arange(30, dtype=torch.float64) + 0.5) * 0.001 / rest
    for tokens in (
        draw(probabilities_V.expand(30, -1), uniform_B).tolist(),
        draw_filtered(probabilities_V.expand(30, -1), [SamplingParams(min_p=1e-9)] * 30, uniform_B).tolist(),
    ):
        assert len(set(tokens)) >= 29
        assert min(tokens) > rest - 200


@pytest.mark.parametrize(
    ("temperature", "scale", "token"),
    [(1e-37, 1, 0), (1e-320, 1, 0), (1e-4, 1, 0), (1e-4, 1e34, 0), (1e-320, 1e34, 0), (1e37, 1, 2), (1e300, 1, 2)],
)
def test_extreme_temperatures(temperature, scale, token):
    """Down to where fp32 holds no such number: the coldest takes the maximum, the hottest takes all alike."""
    logits_1V = torch.tensor([[1e4, 1e4 - 1, -1e4, -math.inf]]) * scale
    state = state_of(temperature=temperature, top_k=3, seed=7)
    while state.uniform(state.num_tokens) < 0.9:
        state.commit(0)
    assert sample([SampleRow(state)], logits_1V) == [token]


@pytest.mark.parametrize("top_k", [301, 10**6, 2**70])
def test_top_k_beyond_the_vocabulary_keeps_all(top_k):
    logits_1V = random_logits(1, 300, seed=6)
    for seed in range(20):
        rows = [SampleRow(state_of(seed=seed, top_k=k)) for k in (300, top_k)]
        assert len(set(sample(rows, logits_1V.expand(2, -1)))) == 1


MIXED = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 4},
    {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 2.0, "min_p": 0.05, "repetition_penalty": 1.3},
    {"logit_bias": {5: 2.0, 6: -2.0}},
    {},
    {"temperature": 0, "min_tokens": 9, "stop_token_ids": [3]},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype):
    """Greedy and sampled rows, each filter and penalty on in some rows: as each row alone, log-probabilities too."""
    generator = torch.Generator().manual_seed(5)
    rows = [
        SampleRow(
            state_of(prompt=range(40), answer=[1, 2, 2, 5], seed=index, logprobs=2, **params),
            tuple(torch.randint(3000, (index % 3,), generator=generator).tolist()),
        )
        for index, params in enumerate(MIXED * 3)
    ]
    logits_RV = random_logits(len(rows), 3000, seed=5).to(dtype)
    before = logits_RV.clone()
    together = Sampler(2900)(rows, logits_RV)
    assert torch.equal(logits_RV, before)
    for index, row in enumerate(rows):
        assert Sampler(2900)([row], logits_RV[index : index + 1]) == [together[index]]
    assert together[0].token_id == int(logits_RV[0, :2900].argmax())


def naive_shaped(logits, prompt, answer, params):
    """The definitions, token by token, in Python's floats."""
    out = list(logits)
    for token, bias in (params.logit_bias or {}).items():
        out[token] += bias
    for token in set(prompt) | set(answer):
        r = params.repetition_penalty
        out[token] = out[token] / r if out[token] > 0 else out[token] * r
    for token in set(answer):
        out[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    return out


@pytest.mark.parametrize("split", [0, 1, 4, 9])
@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 1.9},
        {"frequency_penalty": 1.3},
        {"frequency_penalty": -0.7, "presence_penalty": -0.4},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6, "frequency_penalty": 0.8, "presence_penalty": 0.2},
        {"logit_bias": {3: 4.5, 7: -100.0, 11: 0.5}, "repetition_penalty": 1.5},
    ],
)
def test_penalties_match_their_definitions(params, split):
    """Whichever part of the history is accepted and whichever is only supposed: the same, and repeats count."""
    prompt, answer = [1, 4, 4, 9, 30], [3, 7, 3, 3, 11, 1, 12, 7, 12]
    state = state_of(prompt, answer[:split], temperature=0, **params)
    row = SampleRow(state, tuple(answer[split:]))
    sampler_32 = Sampler(32)
    for seed in range(30):
        logits_1M = random_logits(1, 40, seed)  # padded: prompts may hold ids that are never sampled
        expected = naive_shaped(logits_1M[0].tolist(), [*prompt, 39], answer, state.params)[:32]
        assert sampler_32([row], logits_1M)[0].token_id == expected.index(max(expected))


def test_histories_of_many_distinct_tokens():
    generator = torch.Generator().manual_seed(1)
    answer = torch.randint(2000, (3000,), generator=generator).tolist()
    state = state_of([5], answer, temperature=0, frequency_penalty=1.0, repetition_penalty=1.1)
    logits_1V = random_logits(1, 2000, seed=10)
    expected = naive_shaped(logits_1V[0].tolist(), [5], answer, state.params)
    assert sample([SampleRow(state)], logits_1V) == [expected.index(max(expected))]


def test_drafts_leave_no_trace():
    state = state_of([5], [1, 2], temperature=0, frequency_penalty=2.0, repetition_penalty=1.4)
    logits_1V = random_logits(1, 50, seed=8)
    before = sample([SampleRow(state)], logits_1V)
    sample([SampleRow(state, tuple(range(k, 50))) for k in range(40)], logits_1V.expand(40, -1))
    assert sample([SampleRow(state)], logits_1V) == before
    assert state.num_tokens == 2


def test_min_tokens_keeps_end_and_stop_tokens_away():
    """Up to the position that min_tokens names, the drafts before the row counted; ids past the model do no harm."""
    logits_1V = torch.zeros(1, 8)
    logits_1V[0, 1], logits_1V[0, 6], logits_1V[0, 4] = 9.0, 8.0, 7.0
    state = state_of(answer=[2, 2], end=[1, 1000], temperature=0, min_tokens=4, stop_token_ids=[6])
    rows = [SampleRow(state, (2,) * extra) for extra in range(4)]
    assert sample(rows, logits_1V.expand(4, -1)) == [4, 4, 1, 1]


def test_padding_is_never_sampled():
    """Ids past the tokenizer, where the padded embedding of a model may have its maximum (sgl-project/sglang#5224)."""
    logits_1M = torch.zeros(1, 40)
    logits_1M[0, 33], logits_1M[0, 7] = 50.0, 3.0
    states = [state_of(temperature=0)] + [state_of(seed=seed, temperature=5.0) for seed in range(200)]
    sampled = Sampler(32)([SampleRow(state) for state in states], logits_1M.expand(len(states), -1))
    assert sampled[0].token_id == 7
    assert max(token.token_id for token in sampled) == 31


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3, "top_p": 0.5}, {"seed": 3, "logprobs": 3}])
def test_logits_that_are_not_finite_end_their_own_row(value, params):
    logits_RV = random_logits(3, 50, seed=9)
    rows = [SampleRow(state_of(**params)) for _ in range(3)]
    whole = Sampler(50)(rows, logits_RV)
    logits_RV[1, 2] = value
    sampled = Sampler(50)(rows, logits_RV)
    assert sampled[1].token_id == -1
    assert "not finite" in (sampled[1].error or "")
    assert sampled[::2] == whole[::2]
    assert Sampler(50)(rows[1:2], logits_RV[1:2]) == sampled[1:2]


def test_uniforms_belong_to_seed_choice_and_position():
    """Equal whenever asked, different otherwise; evenly spread (chi-square over 64 cells)."""
    stream = [state_of(seed=11).uniform(position) for position in range(6400)]
    assert [state_of(seed=11).uniform(position) for position in (5, 3, 5)] == [stream[5], stream[3], stream[5]]
    assert all(0 <= value < 1 for value in stream)
    others = [SamplingState(SamplingParams(seed=11), choice=1), state_of(seed=12), state_of(seed=-11), state_of()]
    assert not {other.uniform(position) for other in others for position in range(6400)} & set(stream)
    assert state_of().uniform(0) != state_of().uniform(0)
    cells = [0] * 64
    for value in stream:
        cells[int(value * 64)] += 1
    assert sum((count - 100) ** 2 / 100 for count in cells) < chi_square_limit(63)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 2},
        {"seed": 3, "top_p": 0.8, "presence_penalty": 1.0, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"temperature": 0, "frequency_penalty": 1.5, "min_tokens": 12, "logit_bias": {1: 4.0}},
    ],
)
def test_speculation_gives_the_same_tokens(params):
    """Any drafts, right or wrong, verified in one call a step: the tokens of one call a token."""
    table = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))

    def logits_after(history):
        return table[sum(history[-2:]) % 7] * 2

    history = [1]
    state = state_of(history, end=[1], **params)
    while len(history) < 60:
        (token,) = sample([SampleRow(state)], logits_after(history)[None])
        state.commit(token)
        history.append(token)

    generator = torch.Generator().manual_seed(2)
    verified = [1]
    state = state_of([1], end=[1], **params)
    while len(verified) < 60:
        drafts = torch.randint(24, (3,), generator=generator).tolist()
        right = int(torch.randint(4, (1,), generator=generator))
        drafts[:right] = history[len(verified) : len(verified) + right]
        rows = [SampleRow(state, tuple(drafts[:count])) for count in range(len(drafts) + 1)]
        tokens = sample(rows, torch.stack([logits_after(verified + drafts[:j]) for j in range(len(drafts) + 1)]))
        for index, token in enumerate(tokens):
            state.commit(token)
            verified.append(token)
            if index < len(drafts) and drafts[index] != token:
                break
    assert verified[:60] == history
