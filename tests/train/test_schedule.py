"""The schedule against sums done by hand, against loops that take one step at a time, and against the report's run."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.config import ModelConfig
from fireflyer.train.ramp import BatchRamp
from fireflyer.train.recipe import load_recipe
from fireflyer.train.schedule import (
    batch_size_at,
    bias_speed,
    learning_rate,
    mtp_weight,
    run_steps,
    run_tokens,
    schedule_table,
    warmup_steps,
)
from fireflyer.train.settings import BalanceSettings, FinalPhase, MtpSettings, Recipe, ScheduleSettings

T, B = 10**12, 10**9


@pytest.fixture(scope="module")
def v3() -> Recipe:
    return load_recipe("deepseek-v3")


def small(tiny: ModelConfig, **changes: object) -> Recipe:
    return Recipe.model_validate({"model": tiny, "steps": 100, "batch_size": 4, "seq_len": 8, **changes})


@pytest.fixture(scope="module")
def tiny() -> ModelConfig:
    return load_recipe("ember").model


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (469 * B, 2.2e-4),
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        # A quarter, a half and the whole of the cosine over 4.3T; (1 + cos(pi/4)) / 2 = 0.85355339...
        (10 * T + 1075 * B, 2.2e-5 + 1.98e-4 * 0.8535533905932737),
        (10 * T + 2150 * B, (2.2e-4 + 2.2e-5) / 2),
        (14 * T + 300 * B, 2.2e-5),
        (14 * T + 633 * B - 1, 2.2e-5),
        (14 * T + 633 * B, 7.3e-6),
        (14 * T + 800 * B - 1, 7.3e-6),
        (20 * T, 7.3e-6),
    ],
)
def test_v3_learning_rate_at_each_boundary(v3: Recipe, tokens: int, lr: float) -> None:
    assert learning_rate(v3, 10**6, tokens) == pytest.approx(lr, rel=1e-12)


def test_v3_warms_up_over_2000_steps(v3: Recipe) -> None:
    assert learning_rate(v3, 0, 0) == pytest.approx(2.2e-4 / 2000)
    assert learning_rate(v3, 999, 13 * B) == pytest.approx(1.1e-4)
    assert learning_rate(v3, 1999, 28 * B) == 2.2e-4


def test_v3_mtp_weight_and_bias_speed_switch_where_the_report_says(v3: Recipe) -> None:
    assert [mtp_weight(v3, 10 * T + d) for d in (-1, 0)] == [0.3, 0.1]
    assert [bias_speed(v3, 14 * T + 300 * B + d) for d in (-1, 0)] == [0.001, 0.0]


def test_v3_run_has_15_000_steps_of_ramp_and_227_785_after(v3: Recipe) -> None:
    # Linear in tokens: d(tokens)/d(step) = 4096·(3072 + 12288·tokens/469e9), so the ramp takes
    # 469e9 / (4096·12288) · ln(15360/3072) steps; after it (14.8e12 - 469e9) / (4096·15360).
    ramp = 469e9 / (4096 * 12288) * math.log(5)
    assert ramp == pytest.approx(14997, abs=1)
    rows = {row.tokens: row for row in schedule_table(v3)}
    assert rows[469 * B].step == pytest.approx(ramp, rel=1e-3)
    assert rows[14800 * B].step - rows[469 * B].step == pytest.approx((14.8e12 - 469e9) / (4096 * 15360), abs=2)
    assert run_steps(v3) == 242_785


def test_v3_batch_grows_from_3072_to_15360_in_multiples_of_128(v3: Recipe) -> None:
    assert [batch_size_at(v3, tokens) for tokens in (0, 469 * B // 2, 469 * B, 14 * T)] == [3072, 9216, 15360, 15360]
    assert all(batch_size_at(v3, tokens) % 128 == 0 for tokens in range(0, 469 * B, 7 * B))


def test_v3_table_has_the_reports_boundaries_in_order(v3: Recipe) -> None:
    rows = schedule_table(v3)
    assert [row.tokens for row in rows][2:] == [469 * B, 10 * T, 14_300 * B, 14_633 * B, 14_800 * B]
    assert [row.step for row in rows][:2] == [0, 2000]
    assert rows[-1].lr == 7.3e-6
    assert rows[-1].tokens_per_step == 62_914_560
    assert [row.step for row in rows] == sorted(row.step for row in rows)


@given(
    start=st.integers(1, 20),
    grown=st.integers(0, 30),
    multiple=st.integers(1, 5),
    ramp_tokens=st.integers(1, 20_000),
    seq_len=st.integers(2, 50),
    target=st.integers(0, 40_000),
)
@settings(max_examples=150, deadline=None)
def test_ramp_equals_taking_the_steps_one_by_one(
    start: int, grown: int, multiple: int, ramp_tokens: int, seq_len: int, target: int
) -> None:
    ramp = BatchRamp(start * multiple, (start + grown) * multiple, ramp_tokens, multiple, seq_len)
    step, tokens = 0, 0
    while tokens < target:
        exact = ramp.start + (ramp.end - ramp.start) * min(1.0, tokens / ramp_tokens)
        batch = ramp.batch_size_at(tokens)
        assert batch % multiple == 0
        assert abs(batch - exact) <= multiple / 2 + 1e-9
        assert ramp.tokens_after(step) == tokens
        tokens += batch * seq_len
        step += 1
    assert ramp.steps_to(target) == step
    assert ramp.tokens_after(step) == tokens


def test_shares_are_of_the_runs_tokens_and_steps(tiny: ModelConfig) -> None:
    recipe = small(
        tiny,
        schedule=ScheduleSettings(lr=1e-3, warmup_steps="5%", constant_until="50%", cosine_until="75%", cosine_lr=1e-4),
        balance=BalanceSettings(bias_until="90%"),
        mtp=MtpSettings(late_from="25%"),
    )
    assert run_tokens(recipe) == 100 * 4 * 8
    assert warmup_steps(recipe) == 5
    assert [learning_rate(recipe, step, step * 32) for step in (0, 4, 50)] == pytest.approx([2e-4, 1e-3, 1e-3])
    assert learning_rate(recipe, 75, 2400) == 1e-4
    assert [bias_speed(recipe, tokens) for tokens in (2879, 2880)] == [0.001, 0.0]
    assert [mtp_weight(recipe, tokens) for tokens in (799, 800)] == [0.3, 0.1]


def test_defaults_hold_on_a_run_of_one_step(tiny: ModelConfig) -> None:
    recipe = small(tiny, steps=1)
    assert warmup_steps(recipe) == 0
    assert learning_rate(recipe, 0, 0) == recipe.schedule.lr


def test_the_cosine_ends_at_a_tenth_unless_told(tiny: ModelConfig) -> None:
    recipe = small(tiny, schedule=ScheduleSettings(lr=1e-3, constant_until=0, cosine_until="50%"))
    assert learning_rate(recipe, 60, 60 * 32) == pytest.approx(1e-4)


def test_final_phases_hold_in_turn_and_the_last_goes_on(tiny: ModelConfig) -> None:
    final = [FinalPhase(until=300, lr=3e-5), FinalPhase(until=400, lr=2e-5)]
    schedule = ScheduleSettings(lr=1e-3, constant_until=100, cosine_until=200, cosine_lr=5e-5, final=final)
    recipe = small(tiny, schedule=schedule)
    assert [learning_rate(recipe, 99, tokens) for tokens in (200, 300, 399, 400, 3000)] == [
        3e-5,
        2e-5,
        2e-5,
        2e-5,
        2e-5,
    ]


def test_a_run_by_tokens_ends_with_the_step_that_reaches_them(tiny: ModelConfig) -> None:
    assert [run_steps(small(tiny, steps=None, tokens=tokens)) for tokens in (1, 32, 33, 64)] == [1, 1, 2, 2]


def test_table_of_a_short_run_leaves_out_what_it_does_not_reach() -> None:
    rows = schedule_table(load_recipe("deepseek-v3", ["tokens=20B", "schedule.warmup_steps=100"]))
    assert [row.events for row in rows] == [("start",), ("warm-up over",), ("end",)]
    assert rows[-1].tokens == 20 * B
