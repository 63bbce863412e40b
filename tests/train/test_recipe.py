"""Recipes: what a command line comes to, what is refused and in which words, and that TOML loses nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fireflyer.config import ModelConfig, load_config
from fireflyer.config.files import PRESETS
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.quantities import format_quantity, parse_boundary, parse_quantity, resolve_boundary
from fireflyer.train.recipe import (
    as_tables,
    load_recipe,
    read_recipe,
    recipe_differences,
    take_stored_choices,
    to_toml,
    with_epoch_tokens,
)
from fireflyer.train.settings import OptimizerSettings, Recipe
from fireflyer.train.toml import to_toml_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHAPE = """
[model]
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 16
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
q_lora_rank = 0
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
n_group = 2
topk_group = 1
routed_scaling_factor = 1.0
max_position_embeddings = 1024
"""


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str = "steps = 10\n", name: str = "my.toml") -> Path:
        (tmp_path / name).write_text(text + SHAPE)
        return tmp_path / name

    return write


# --- Quantities


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (1000, 1000),
        (1e6, 10**6),
        ("14.8T", 14_800_000_000_000),
        ("469B", 469 * 10**9),
        ("2.5m", 2_500_000),
        ("1e6", 10**6),
        ("1_000", 1000),
        ("3 K", 3000),
        ("0.0000000000001T", None),
        ("1.5", None),
        (1.5, None),
        (-1, None),
        (2**63, None),
        ("-3M", None),
        ("3G", None),
        ("", None),
        (True, None),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
        ([], None),
    ],
)
def test_quantities(value: object, count: int | None) -> None:
    if count is not None:
        assert parse_quantity(value) == count
    else:
        with pytest.raises(ValueError, match="must be"):
            parse_quantity(value)


@given(st.integers(0, 10**16))
def test_a_formatted_quantity_reads_back_exactly(count: int) -> None:
    assert parse_quantity(format_quantity(count)) == count


def test_quantities_are_spelt_as_one_says_them() -> None:
    assert [format_quantity(n) for n in (14_633 * 10**9, 62_914_560, 100_000, 7)] == [
        "14.633T",
        "62914560",
        "100K",
        "7",
    ]


def test_boundaries_are_counts_or_shares() -> None:
    assert [parse_boundary(value) for value in ("70%", " 12.5 %", "10T", 5)] == ["70%", "12.5%", 10**13, 5]
    assert [resolve_boundary(boundary, 1001) for boundary in ("70%", "0%", "100%", 12)] == [700, 0, 1001, 12]
    # 0.1% of 10**18 and 7% of 100 are not what floating point makes of them.
    assert resolve_boundary("0.1%", 10**18 + 1000) == 10**15 + 1
    assert resolve_boundary("7%", 100) == 7
    for wrong in ("101%", "-1%", "x%", "%"):
        with pytest.raises(ValueError, match="must be"):
            parse_boundary(wrong)


# --- Where settings come from


def test_ember_is_the_recipe_of_a_bare_command() -> None:
    assert load_recipe() == load_recipe("ember") == load_recipe(PRESETS / "ember.toml")


def test_overrides_take_toml_values_and_bare_words(file: Callable[..., Path]) -> None:
    overrides = [
        "dtype=fp32",
        "optimizer.betas=[0.8, 0.9]",
        "compile=true",
        'data.text_column="a b"',
        "schedule.final=[{until='2M', lr=1e-5}]",
        "model.rope_scaling={type='yarn', factor=2.0, original_max_position_embeddings=512}",
        "eval_data=['a.txt', 'b.txt:0.5']",
    ]
    recipe = load_recipe(file(), overrides)
    assert recipe.dtype == "fp32"
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.compile is True
    assert recipe.data.text_column == "a b"
    assert [(phase.until, phase.lr) for phase in recipe.schedule.final] == [(2_000_000, 1e-5)]
    assert recipe.model.rope_scaling is not None
    assert recipe.model.rope_scaling.factor == 2.0
    assert recipe.eval_data == ["a.txt", "b.txt:0.5"]


def test_options_set_their_keys_and_set_has_the_last_word(file: Callable[..., Path]) -> None:
    recipe = load_recipe(file(), ["data.sources=['c']"], sources=["a", "b:2"], encoding_errors="replace")
    assert recipe.data.sources == ["c"]
    assert recipe.data.encoding_errors == "replace"
    assert load_recipe(file(), sources=["a", "b:2"]).data.sources == ["a", "b:2"]


def test_the_command_line_decides_the_length(file: Callable[..., Path]) -> None:
    lengths = [
        load_recipe(file("steps = 10\n"), sets) for sets in ([], ["tokens=1M"], ["epochs=2"], ["tokens=1M", "steps=3"])
    ]
    assert [(r.steps, r.tokens, r.epochs) for r in lengths] == [
        (10, None, None),
        (None, 10**6, None),
        (None, None, 2),
        (3, None, None),
    ]


def test_a_model_shape_trains_with_the_default_settings(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(load_config("ember").to_dict()))
    recipe = load_recipe(tmp_path, ["steps=3"])
    assert recipe == Recipe(model=load_config("ember"), steps=3)
    assert load_recipe("moonlight", ["steps=3"]).model == load_config("moonlight")


def test_quantised_shapes_train_in_full_precision(tmp_path: Path) -> None:
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(
        json.dumps(load_config("ember").to_dict() | {"quantization_config": quantised})
    )
    assert load_config(tmp_path).quantization_config is not None
    assert load_recipe(tmp_path, ["steps=3"]).model == load_config("ember")
    with pytest.raises(UserError, match=r"model.quantization_config: training keeps its weights in fp32"):
        load_recipe("ember", ["model.quantization_config={quant_method='fp8', weight_block_size=[128, 128]}"])


def test_a_run_folder_gives_its_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("ember", ["steps=7"])
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path) == recipe


def test_a_checkpoint_brings_its_model_and_its_tokenizer(tmp_path: Path, file: Callable[..., Path]) -> None:
    model = load_config("ember").replace(hidden_size=64)
    (tmp_path / "config.json").write_text(json.dumps(model.to_dict()))
    with pytest.raises(UserError, match=r"no tokenizer\.json in it; give its own with --tokenizer"):
        load_recipe(None, ["steps=3"], init_from=str(tmp_path))
    write_tokenizer(tmp_path / "tokenizer.json")
    other_shape = 'rope_parameters = {type = "yarn", factor = 2.0, original_max_position_embeddings = 512}\n'
    other = file("steps = 5\nbatch_size = 3\n")
    other.write_text(other.read_text() + other_shape)
    for config in (None, other):
        recipe = load_recipe(config, ["steps=3"], init_from=str(tmp_path))
        assert recipe.model == model
        assert recipe.init_from == str(tmp_path)
        assert recipe.data.tokenizer == str(tmp_path / "tokenizer.json")
    assert recipe.batch_size == 3


def write_tokenizer(path: Path) -> int:
    """A tokenizer of nothing but bytes and special tokens; returns its size."""
    tokenizer = Tokenizer.train(["some text"], vocab_size=300)
    tokenizer.save(path.parent)
    (path.parent / "tokenizer.json").rename(path)
    return tokenizer.vocab_size


# --- The presets


def test_v3_trains_its_published_shape_without_yarn_and_narrower_weights() -> None:
    published = load_config("deepseek-v3")
    trained = load_recipe("deepseek-v3").model
    assert trained == published.replace(
        rope_scaling=None, max_position_embeddings=4096, initializer_range=0.006, quantization_config=None
    )
    assert published.rope_scaling is not None


def test_every_figure_of_the_report_is_a_key_of_the_preset() -> None:
    tables = tomllib.loads((PRESETS / "deepseek-v3.toml").read_text())
    assert (tables["tokens"], tables["seq_len"], tables["batch_size"]) == ("14.8T", 4096, 15360)
    assert tables["model"]["initializer_range"] == 0.006
    assert tables["data"] == {"fim_rate": 0.1, "mask_documents": False}
    assert tables["balance"] == {"bias_speed": 0.001, "bias_until": "14.3T", "sequence_alpha": 1e-4}
    assert tables["mtp"] == {"weight": 0.3, "late_weight": 0.1, "late_from": "10T"}
    assert tables["optimizer"] == {"name": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.1, "grad_clip": 1.0}
    assert tables["ema"]["decay"] > 0


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_survives_toml(preset: str, tmp_path: Path) -> None:
    whole = "[model]" in (PRESETS / f"{preset}.toml").read_text()
    recipe = load_recipe(None if whole else "spark", base=preset)  # those of post-training have no model
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert read_recipe(tmp_path / "recipe.toml") == recipe


# --- TOML


def test_a_recipe_with_every_key_survives_toml(file: Callable[..., Path], tmp_path: Path) -> None:
    overrides = [
        "optimizer.name=muon",
        "optimizer.eps=1e-20",
        "schedule.constant_until=10%",
        "schedule.cosine_until=1T",
        "schedule.final=[{until='60%', lr=0.0}, {until='2T', lr=1e-5}]",
        "schedule.batch_start=4",
        "schedule.batch_ramp_tokens=1K",
        r"""eval_data=['a "quoted" \ name', "ж\u007f"]""",
        "model.eos_token_id=[1, 2]",
        "model.rope_scaling={type='yarn', factor=2.0, original_max_position_embeddings=512}",
        "model.rope_scaling.mscale=0.7",
        "model.rope_scaling.mscale_all_dim=0.7",
    ]
    recipe = load_recipe(file("tokens = '3T'\n"), overrides)
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    back = read_recipe(tmp_path / "recipe.toml")
    assert back == recipe
    assert back.model.q_lora_rank is None
    assert back.eval_data == ['a "quoted" \\ name', "ж\u007f"]


plain = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), plain, max_size=4))
def test_toml_text_reads_back_equal(tables: dict[str, object]) -> None:
    assert tomllib.loads(to_toml_text(tables)) == tables


# --- What is refused

MISTAKES = [
    ("optimizer.beta=1", r"unknown key optimizer.beta in --set optimizer.beta=1; did you mean optimizer.betas\?"),
    ("lr=1e-3", r"unknown key lr in --set lr=1e-3; did you mean schedule.lr\?"),
    ("optimizer.lr=1e-3", r"unknown key optimizer.lr in .*; did you mean schedule.lr\?"),
    ("schedule.lr.x=1", r"unknown key schedule.lr.x"),
    (
        "model.n_routed_expert=3",
        r"--set model.n_routed_expert=3: unknown key n_routed_expert.*did you mean n_routed_experts",
    ),
    ("schedule.final=[{until=3, rate=4}]", r"unknown key schedule.final\[0\].rate in --set"),
    ("schedule.final=[{until=3}]", r"schedule.final\[0\].lr is missing in --set"),
    ("batch_size=big", r"batch_size = 'big': must be a whole number \(--set batch_size=big\)"),
    ("batch_size=true", r"batch_size = True: must be a whole number"),
    ("batch_size=0", r"batch_size = 0: must be greater than or equal to 1"),
    ("compile=yes", r"compile = 'yes': must be true or false"),
    ("optimizer.betas=0.9", r"optimizer.betas = 0.9: must be a list"),
    ("optimizer.betas=[0.9, 1.0]", r"optimizer.betas\[1\] = 1.0: must be less than 1"),
    ("optimizer=adamw", r"optimizer = 'adamw': must be a table"),
    ("schedule.lr=nan", r"schedule.lr = nan: "),
    ("dtype=fp16", r"dtype = 'fp16': must be 'auto', 'fp32' or 'bf16' \(--set dtype=fp16\)"),
    ("device=gpu", r"device = 'gpu': must be 'auto', 'cpu'"),
    ("tokens=3G", r"tokens = '3G': must be a count such as"),
    ("steps=0", r"steps = 0 leaves nothing to train; it must be above 0 \(--set steps=0\)"),
    ("data.fim_rate=1.5", r"data.fim_rate = 1.5: must be less than or equal to 1"),
    ("data.held_out=1.0", r"data.held_out = 1.0: must be less than 1"),
    (
        "seq_len=2000",
        r"seq_len = 2000 is above model.max_position_embeddings = 1024; set 1024 at most \(--set seq_len=2000\)",
    ),
    ("parallel.micro_batch_size=3", r"parallel.micro_batch_size = 3 does not divide batch_size = 16"),
    ("schedule.batch_start=4", r"schedule.batch_start and schedule.batch_ramp_tokens go together"),
    ("schedule.warmup_steps=10", r"schedule.warmup_steps = 10 must be below the run's 10 steps"),
    ("schedule.cosine_until=50%", r"schedule.cosine_until = '50%' lies before schedule.constant_until = '70%'"),
    ("schedule.cosine_until=50K", r"schedule.cosine_until = 50000 lies before schedule.constant_until = '70%'"),
    ("model.n_group=3", r"n_group 3 doesn't divide n_routed_experts 4"),
    ("model=3", r"no \[model\] table"),
    ("steps", r"--set steps: not KEY=VALUE"),
    ("=3", r"--set =3: not KEY=VALUE"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_on_the_command_line_is_told_in_one_line(
    file: Callable[..., Path], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(file(), [override])
    assert "\n" not in str(caught.value)


RAMP = "steps = 3\n[schedule]\nbatch_start = 8\nbatch_ramp_tokens = "
FILE_MISTAKES = [
    ("", r"the run has no length: set steps, tokens or epochs.*my.toml"),
    ("steps = 3\nstep = 3\n", r"unknown key step in .*my.toml; did you mean steps\?"),
    ("[optimizer]\nbeta = 1\n", r"unknown key optimizer.beta in .*my.toml; did you mean optimizer.betas\?"),
    ("steps = 3\n[data]\nsources = 'a'\n", r"data.sources = 'a': must be a list \(.*my.toml\)"),
    ("batch_size = 4\n" + RAMP + "9\n", r"batch_start = 8 is above batch_size"),
    (RAMP + "0\n", r"batch_ramp_tokens = 0: leave it out"),
    (RAMP + "9\nbatch_multiple = 3\n", r"batch_multiple = 3 does not divide"),
    (
        RAMP + "9\n[parallel]\nmicro_batch_size = 4\n",
        r"batch_multiple = 1 must be a multiple of parallel.micro_batch_size",
    ),
    ("steps = 3\neval_every = 1\n[data]\nheld_out = 0.0\n", r"eval_every needs held-out text"),
    ("steps = \n", r"my.toml: broken TOML: .*line 1"),
]


@pytest.mark.parametrize(("text", "message"), FILE_MISTAKES)
def test_a_mistake_in_a_file_names_the_file(file: Callable[..., Path], text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(file(text))


def test_a_config_that_is_nowhere_names_the_nearest_preset() -> None:
    with pytest.raises(UserError, match=r"'embers' is no file or folder and no preset; did you mean ember\?"):
        load_recipe("embers")
    with pytest.raises(UserError, match=r"--from nowhere: no such folder"):
        load_recipe(init_from="nowhere")


def test_a_recipe_built_in_python_is_checked_too() -> None:
    with pytest.raises(ValidationError, match="must be below the run's 5 steps"):
        Recipe.model_validate({"model": load_config("ember"), "steps": 5, "schedule": {"warmup_steps": 5}})


# --- The tokenizer's size


def test_the_models_vocabulary_is_the_tokenizers_where_the_recipe_leaves_it_open(
    file: Callable[..., Path], tmp_path: Path
) -> None:
    size = write_tokenizer(tmp_path / "t.json")
    tokenizer = str(tmp_path / "t.json")
    assert load_recipe(file()).model.vocab_size == 4096
    assert load_recipe(file(), tokenizer=tokenizer).model.vocab_size == size
    assert load_recipe(file(), ["model.vocab_size=0"], tokenizer=tokenizer).model.vocab_size == size
    assert load_recipe(file(), ["model.vocab_size=1000"], tokenizer=tokenizer).model.vocab_size == 1000
    with pytest.raises(
        UserError, match=rf"t.json: the tokenizer has {size} tokens and the model only model.vocab_size = 64"
    ):
        load_recipe(file(), ["model.vocab_size=64"], tokenizer=tokenizer)


# --- Reruns


def test_a_rerun_may_change_length_and_cadences_and_nothing_else(file: Callable[..., Path]) -> None:
    stored = load_recipe(file())
    allowed = ["steps=20", "checkpoint_every=3", "keep_checkpoints=5", "eval_every=4", "log_every=2"]
    assert recipe_differences(stored, load_recipe(file(), allowed)) == []
    assert recipe_differences(stored, load_recipe(file(), ["tokens=1M"])) == []
    changed = ["seed=1", "optimizer.weight_decay=0.2", "data.sources=['a']", "eval_data=['b']", "model.vocab_size=512"]
    assert recipe_differences(stored, load_recipe(file(), changed)) == [
        "data.sources: [] -> ['a']",
        "eval_data: not set -> ['b']",
        "model.vocab_size: 4096 -> 512",
        "optimizer.weight_decay: 0.1 -> 0.2",
        "seed: 0 -> 1",
    ]
    of_grpo = load_recipe(file(), ["grpo.group_size=4", "seed=1"])
    assert recipe_differences(stored, of_grpo) == ["[grpo]: not given -> given", "seed: 0 -> 1"]
    assert recipe_differences(of_grpo, stored) == ["[grpo]: given -> not given", "seed: 1 -> 0"]


def test_what_the_run_chose_is_taken_and_not_chosen_anew(file: Callable[..., Path]) -> None:
    stored = load_recipe(file(), ["device=cpu", "dtype=fp32", "threads=2"])
    again = load_recipe(file())
    assert recipe_differences(stored, again) == []
    assert take_stored_choices(again, stored) == stored
    assert recipe_differences(stored, load_recipe(file(), ["threads=1"])) == ["threads: 2 -> 1"]


def test_epochs_become_tokens_once_the_data_is_counted(file: Callable[..., Path]) -> None:
    recipe = load_recipe(file("epochs = 1.5\n"))
    assert recipe.total_steps is None
    counted = with_epoch_tokens(recipe, 100_000)
    assert (counted.epochs, counted.tokens) == (None, 150_000)
    assert with_epoch_tokens(load_recipe(file("steps = 3\n")), 100_000) == load_recipe(file("steps = 3\n"))
    late = load_recipe(file("epochs = 1\n"), ["schedule.constant_until=1M"])
    with pytest.raises(
        UserError, match=r"schedule.cosine_until = '100%' lies before schedule.constant_until = 1000000"
    ):
        with_epoch_tokens(late, 999)


def test_tables_hold_every_setting_once(file: Callable[..., Path]) -> None:
    tables = as_tables(load_recipe(file()))
    assert set(OptimizerSettings.model_fields) == set(tables["optimizer"])
    assert ModelConfig.from_dict(tables["model"]) == load_recipe(file()).model
