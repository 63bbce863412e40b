"""The size dial: the count is hit, the figures are the published fits', the user's own settings win."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyer.cli.main import main
from fireflyer.cost.flops import training_flops_per_token
from fireflyer.cost.parameters import count_parameters
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.recipe import load_recipe
from fireflyer.train.size import parse_size


@settings(deadline=None, max_examples=60)
@given(st.floats(math.log(250e3), math.log(2e12)))
def test_the_model_has_the_size_asked_for(log_size: float) -> None:
    size = int(math.exp(log_size))
    recipe = load_recipe(size=str(size))
    assert count_parameters(recipe.model).total == pytest.approx(size, rel=0.06)
    assert recipe.seq_len <= recipe.model.max_position_embeddings


def test_larger_models_are_wider_slower_to_learn_and_see_more() -> None:
    recipes = [load_recipe(size=size) for size in ("500K", "5M", "50M", "500M", "5B", "50B", "500B")]
    for smaller, larger in pairwise(recipes):
        assert smaller.model.hidden_size < larger.model.hidden_size
        assert smaller.schedule.lr > larger.schedule.lr
        assert smaller.tokens is not None
        assert larger.tokens is not None
        assert smaller.tokens < larger.tokens


@pytest.mark.parametrize(
    ("length", "steps"), [([], None), (["tokens=3M"], None), (["steps=700"], 700), (["tokens='1B'"], None)]
)
def test_rate_and_batch_follow_the_fits_at_the_compute_of_the_run(length: list[str], steps: int | None) -> None:
    """The batch of arXiv 2401.02954, section 3, with C from the recipe that came out; the rate's own law."""
    recipe = load_recipe(size="4M", overrides=length)
    model, tokens = recipe.model, recipe.total_tokens
    assert tokens is not None
    scale = training_flops_per_token(model, recipe.seq_len) - 6 * model.vocab_size * model.hidden_size
    compute = scale * tokens
    assert recipe.schedule.lr == pytest.approx(2.2e-4 * (3.5e24 / compute) ** 0.075, rel=0.06)
    assert recipe.batch_size * recipe.seq_len == pytest.approx(0.2920 * compute**0.3271, rel=0.06)
    if not length:
        assert scale == pytest.approx(0.1715 * compute**0.5243, rel=0.03)
        assert tokens == pytest.approx(5.8316 * compute**0.4757, rel=0.06)
    if steps:
        assert recipe.total_steps == steps


def test_what_the_user_sets_wins(tmp_path: Path) -> None:
    recipe = load_recipe(size="1M", overrides=["schedule.lr=1e-3", "model.num_hidden_layers=4", "batch_size=7"])
    assert (recipe.schedule.lr, recipe.model.num_hidden_layers, recipe.batch_size) == (1e-3, 4, 7)
    assert recipe.schedule.cosine_lr == pytest.approx(load_recipe(size="1M").schedule.lr / 10)
    assert load_recipe(size="1M", overrides=["epochs=2"]).tokens is None


def test_a_tokenizer_decides_the_vocabulary(tmp_path: Path) -> None:
    Tokenizer.train(["some text to learn from, and some more text"] * 3, 290).save(tmp_path)
    recipe = load_recipe(size="1M", tokenizer=str(tmp_path / "tokenizer.json"))
    assert recipe.model.vocab_size <= 290
    assert count_parameters(recipe.model).total == pytest.approx(1e6, rel=0.06)
    assert load_recipe(size="1M", overrides=["model.vocab_size=2048"]).model.vocab_size == 2048


@pytest.mark.parametrize("size", ["10", "-3M", "ten", "3T", "", "1.5"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(UserError, match="as --size 10M"):
        parse_size(size)


def test_a_checkpoint_has_its_own_size(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(load_recipe().model.to_dict()), encoding="utf-8")
    with pytest.raises(UserError, match=r"--from .* has its size"):
        load_recipe(size="1M", init_from=str(tmp_path))


def test_the_command_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "--size", "2M", "--set", "tokens=1M", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tokens"] == 1_000_000
    assert facts["parameters"]["total"] == pytest.approx(2e6, rel=0.06)
    assert main(["pretrain", "--size", "2X", "--dry-run"]) == 2


def test_at_v3s_size_the_rule_gives_v3s_own_rate() -> None:
    recipe, v3 = load_recipe(size="671B", overrides=["tokens='14.8T'"]), load_recipe("deepseek-v3")
    assert recipe.schedule.lr == pytest.approx(v3.schedule.lr, rel=0.03)
    assert recipe.model.num_hidden_layers == v3.model.num_hidden_layers
    assert recipe.model.hidden_size == pytest.approx(v3.model.hidden_size, rel=0.03)
