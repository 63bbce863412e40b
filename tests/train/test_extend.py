"""Context extension: what its phases come to, that YaRN is trained and exported, and that a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_run import checkpoint_bytes, tiny_recipe, write_text

from fireflyer import load_model
from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.checkpoint.run_folder import read_metrics
from fireflyer.cli.main import main
from fireflyer.config import RopeScaling
from fireflyer.errors import Stopped
from fireflyer.model.decoder import Decoder
from fireflyer.train.extension import ExtendPhase, LengthPhases
from fireflyer.train.loop import train
from fireflyer.train.recipe import load_recipe, read_recipe
from fireflyer.train.setup import open_inputs

PHASES = "extend.phases=[{seq_len=48, batch_size=2, steps=3}, {seq_len=96, batch_size=1, steps=4}]"
SETTINGS = (PHASES, "extend.factor=8", "threads=1", "schedule.lr=1e-3", "checkpoint_every=1", "data.fim_rate=0.2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl", 200)


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("base") / "run"
    train(tiny_recipe(text, steps=4, model__max_position_embeddings=24), run_dir)
    return run_dir


def recipe_of(base: Path, text: Path, *settings: str):
    return load_recipe(None, [*SETTINGS, *settings], sources=[str(text)], init_from=str(base), base="extend")


@pytest.fixture(scope="module")
def whole(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_of(base, text), run_dir)
    return run_dir


def test_phases_step_by_step():
    phases = LengthPhases([ExtendPhase(seq_len=s, batch_size=b, steps=n) for s, b, n in ((4, 3, 2), (8, 2, 3))])
    sizes = [(4, 3)] * 2 + [(8, 2)] * 5  # the last phase holds on
    seen = 0
    for step, (seq_len, batch_size) in enumerate(sizes):
        assert phases.tokens_after(step) == seen
        assert (phases.seq_len_at(seen), phases.batch_size_at(seen)) == (seq_len, batch_size)
        assert phases.steps_to(seen) == step
        assert phases.steps_to(seen + 1) == step + 1
        seen += seq_len * batch_size
    assert phases.mean_seq_len == pytest.approx((24 * 4 + 48 * 8) / 72)


def test_what_extension_decides(base: Path, text: Path):
    recipe = recipe_of(base, text)
    assert recipe.model.rope_scaling == RopeScaling(
        factor=8, original_max_position_embeddings=24, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1
    )
    assert (recipe.model.max_position_embeddings, recipe.seq_len, recipe.steps) == (192, 96, 7)
    assert recipe.total_tokens == 3 * 2 * 48 + 4 * 96
    plain = load_recipe(
        None, [*SETTINGS, "extend.original=12"], sources=[str(text)], init_from=str(base), base="extend"
    )
    assert plain.model.rope_scaling is not None
    assert (plain.model.rope_scaling.original_max_position_embeddings, plain.model.max_position_embeddings) == (12, 96)


def test_the_published_numbers(tmp_path: Path):
    """V3's own extension: 4,096 tokens by 40 are its 163,840 positions; 62.9B tokens in each phase."""
    shape = json.loads((Path(__file__).parents[2] / "src/fireflyer/presets/deepseek-v3.json").read_text())
    expected = shape.pop("rope_scaling")
    (tmp_path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 4096}))
    recipe = load_recipe(
        None, sources=["builtin:stdlib"], init_from=str(tmp_path), base="extend", tokenizer=_tokenizer(tmp_path)
    )
    assert recipe.model.max_position_embeddings == shape["max_position_embeddings"] == 163_840
    exported = recipe.model.to_dict()["rope_scaling"]
    assert {key: exported[key] for key in expected} == expected
    assert recipe.total_tokens == 1000 * (1920 * 32_768 + 480 * 131_072)
    assert recipe.batch_ramp.tokens_after(1000) == pytest.approx(62.9e9, rel=1e-3)
    assert (recipe.steps, recipe.schedule.lr, recipe.seq_len) == (2000, 7.3e-6, 131_072)


def _tokenizer(folder: Path) -> str:
    from fireflyer.text.tokenizer import Tokenizer

    Tokenizer.train(["a few words"], 300).save(folder)
    return str(folder / "tokenizer.json")


def test_yarn_is_trained_and_exported(base: Path, text: Path, whole: Path, tmp_path: Path):
    recipe = recipe_of(base, text)
    assert main(["export", str(whole), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = config["rope_scaling"]
    assert (scaling["type"], scaling["factor"], scaling["original_max_position_embeddings"]) == ("yarn", 8, 24)
    assert config["max_position_embeddings"] == 192
    # The first step's loss is that of the base's weights under the new config, attention's scale included.
    batch = open_inputs(recipe, tmp_path / "none", None, lambda event: None).objective(load_model(base)).next_batch(2)
    model = Decoder(load_model(whole).config)
    model.load_state_dict(load_model(base).state_dict())
    logits = model(batch.input_ids_BT).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels_BT.flatten()).detach()
    assert read_metrics(whole)[0]["loss"] == pytest.approx(float(expected), abs=1e-5)


def test_each_step_has_its_phases_rows_and_the_text_goes_on(base: Path, text: Path, whole: Path):
    rows = read_metrics(whole)
    assert [row["tokens"] for row in rows] == [96, 192, 288, 384, 480, 576, 672]
    inputs = open_inputs(recipe_of(base, text), base.parent / "none", None, lambda event: None)
    objective = inputs.objective(load_model(base))
    phased = [objective.next_batch(size).input_ids_BT for size in (2, 2, 2, 1, 1, 1, 1)]
    assert [tuple(ids.shape) for ids in phased] == [(2, 48)] * 3 + [(1, 96)] * 4
    one = tiny_recipe(text, init_from=str(base), seq_len=24, steps=9)
    stream = open_inputs(one, base.parent / "none", None, lambda event: None).objective(load_model(base))
    assert torch.equal(torch.cat([ids.flatten() for ids in phased]), stream.next_batch(28).input_ids_BT.flatten())


@pytest.mark.parametrize("stop_after", [1, 3, 5])
def test_stopped_anywhere_it_ends_in_the_same_bytes(base: Path, text: Path, whole: Path, tmp_path: Path, stop_after):
    recipe, seen = recipe_of(base, text), []

    def should_stop() -> bool:
        seen.append(1)
        return len(seen) == stop_after

    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", should_stop=should_stop)
    train(recipe, tmp_path / "run")
    ended, other = newest_good_checkpoint(whole), newest_good_checkpoint(tmp_path / "run")
    assert ended is not None
    assert other is not None
    assert checkpoint_bytes(ended) == checkpoint_bytes(other)
    assert read_recipe(whole / "recipe.toml").extend == recipe.extend
    assert train(recipe, whole).step == 7  # finished: said, and nothing done


def test_a_phase_with_a_text_of_its_own(base: Path, text: Path, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "' + "quartz " * 400 + '"}\n')
    own = f'{{seq_len=96, batch_size=1, steps=1, sources=["{other}"]}}'
    phases = f"extend.phases=[{{seq_len=48, batch_size=2, steps=1}}, {own}]"
    recipe = load_recipe(
        None, [*SETTINGS, phases, "data.held_out=0.0"], sources=[str(text)], init_from=str(base), base="extend"
    )
    inputs = open_inputs(recipe, tmp_path / "none", None, lambda event: None)
    objective = inputs.objective(load_model(base))
    by_phase = load_recipe(
        None,
        [*SETTINGS, f"extend.phases=[{own}]", "data.held_out=0.0"],
        init_from=str(base),
        base="extend",
    )
    assert by_phase.data.sources == [str(other)]
    first, second = (inputs.tokenizer.decode(objective.next_batch(1).input_ids_BT[0].tolist()) for _ in range(2))
    assert "quartz" not in first
    assert "quartz quartz" in second


REFUSED = {
    "shorter": ("extend.phases=[{seq_len=24, batch_size=1, steps=1}]", "phases[0].seq_len = 24 isn't above the 24"),
    "falling": (
        "extend.phases=[{seq_len=48, batch_size=1, steps=1}, {seq_len=48, batch_size=1, steps=1}]",
        "phases[1].seq_len = 48 isn't above the 48 tokens of the phase before",
    ),
    "beyond": ("extend.factor=3", "phases[1].seq_len = 96 is beyond extend.factor = 3 times the 24 tokens"),
    "none": ("extend.phases=[]", "extend.phases"),
    "steps": ("steps=10", "steps = 10: [extend] decides it"),
    "tokens": ("tokens=10000", "tokens = 10000: [extend] decides it"),
    "yarn by hand": ("model.rope_scaling={type='yarn', factor=4, original_max_position_embeddings=24}", "YaRN already"),
    "positions": ("model.max_position_embeddings=40", "max_position_embeddings = 40: [extend] decides it"),
    "original": ("extend.original=25", "extend.original = 25 is above the 24 positions"),
    "unknown": ("extend.phases=[{seq_len=48, batch=1, steps=1}]", "did you mean extend.phases[0].batch_size?"),
    "micro": ("parallel.micro_batch_size=2", "does not divide extend.phases[1].batch_size = 1"),
    "ramp": ("schedule.batch_start=1", "schedule.batch_start"),
    "too little text": ("extend.phases=[{seq_len=48, batch_size=9999, steps=1}]", "too little data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(base: Path, text: Path, tmp_path: Path, capsys, case: str):
    setting, said = REFUSED[case]
    words = ["extend", "--from", str(base), "--data", str(text), "--run", str(tmp_path / "run")]
    settings = [word for each in (*SETTINGS, setting) for word in ("--set", each)]
    assert main([*words, *settings]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_refused_twice_and_elsewhere(text: Path, whole: Path, tmp_path: Path, capsys):
    words = ["--from", str(whole), "--data", str(text), "--run", str(tmp_path / "run")]
    assert main(["extend", *words]) == 2
    assert "it has YaRN already (factor 8.0 from 24 tokens)" in capsys.readouterr().err
    assert main(["extend", *words[2:]]) == 2
    assert "no model to begin from" in capsys.readouterr().err
    assert main(["inspect", str(whole), "--json"]) == 0
    assert main(["sft", *words, "--set", "extend.phases=[{seq_len=240, batch_size=1, steps=1}]"]) == 2
