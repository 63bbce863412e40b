"""SamplingParams: what is refused, and that the refusal names the field, the value and the range."""

import math

import pytest

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
    ],
)
def test_refusals_name_field_and_value(field, value):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})
    text = str(error.value)
    assert field in text
    assert repr(value) in text or repr(value[-1]) in text
    assert "must be" in text
    assert "\n" not in text


def test_limits_are_allowed():
    params = SamplingParams(
        max_tokens=1, temperature=0, top_p=1, top_k=-1, min_p=1, seed=-(2**63), stop="\n", stop_token_ids=[0]
    )
    assert params.greedy
    assert params.stop == ("\n",)
    assert params.stop_token_ids == (0,)
    assert SamplingParams(max_tokens=None, stop=None, seed=2**64 - 1).stop == ()


def test_frozen():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
