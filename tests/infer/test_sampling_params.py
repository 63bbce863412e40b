"""SamplingParams: what is refused, and that the refusal names the field, the value and the range."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.errors import UserError
from fireflyer.infer.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.0001),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 5.0),
        ("min_p", -0.01),
        ("min_p", 1.01),
        ("seed", 1.5),
        ("seed", 2**64),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a", 3]),
        ("stop", 7),
        ("stop_token_ids", 7),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", None),
        ("n", 0),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("temperature", 10**400),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", 101),
        ("logit_bias", [3]),
        ("logprobs", -2),
        ("logprobs", True),
        ("prompt_logprobs", 1.0),
    ],
)
def test_refusals_name_field_and_value(field, value):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})
    text = str(error.value)
    assert field in text
    assert repr(value)[:100] in text or repr(value[-1]) in text
    assert "must be" in text
    assert "\n" not in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = [field.name for field in dataclasses.fields(SamplingParams)]


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(fields), json_values, max_size=4))
def test_whatever_is_asked_is_taken_or_refused_in_one_line(asked):
    try:
        SamplingParams(**asked)
    except UserError as error:
        refusal = str(error)
        assert "\n" not in refusal
        assert any(field in refusal for field in asked)


def nested(depth):
    value = []
    for _ in range(depth):
        value = {"items": [value]}
    return value


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": -(10**5000)},
        {"seed": 10**5000},
        {"temperature": 10**5000},
        {"stop": nested(9999)},
        {"response_format": [nested(9999)]},
        {"response_format": nested(9999)},
        {"response_format": {"type": nested(300)}},
        {"response_format": {"type": "regex", "pattern": "a", "b": nested(9999)}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": nested(9999)}}},
        {"stop": ["x" * 10**6, 3]},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_values_beyond_all_bounds(asked):
    with pytest.raises(UserError) as error:
        SamplingParams(**asked)
    assert len(str(error.value)) < 300


def test_limits_are_allowed():
    params = SamplingParams(
        max_tokens=1, temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), stop="\n", stop_token_ids=[0]
    )
    assert params.greedy
    assert not params.penalized
    assert SamplingParams(min_tokens=256, n=9, logprobs=-1, prompt_logprobs=0, repetition_penalty=0.01).penalized
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (0,)
    assert SamplingParams(max_tokens=None, stop=None, seed=2**64 - 1).stop == ()


@pytest.mark.parametrize("bias", [{3: 101}, {3: "x"}, {3: math.nan}, {-1: 1}, {"x": 1}, {1.5: 1}, {"9" * 5000: 1}])
def test_bad_biases_are_refused(bias):
    with pytest.raises(UserError, match="logit_bias") as error:
        SamplingParams(logit_bias=bias)
    assert len(str(error.value)) < 300


def test_biases_as_json_has_them():
    assert SamplingParams(logit_bias={"50256": -100, 7: 1}).logit_bias == {50256: -100.0, 7: 1.0}
    assert SamplingParams().logit_bias == {}


def test_frozen():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
