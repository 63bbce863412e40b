"""`fireflyer inspect`: published integers through the command, and every refusal as one line with exit code 2."""

import json
from pathlib import Path
from typing import Any

import pytest

from fireflyer.cli.main import main
from fireflyer.config import load_config
from fireflyer.config.files import PRESETS

# README.md and README_WEIGHTS.md of V3, the model cards of the others, and their checkpoints' tensor listings.
PUBLISHED = {
    "deepseek-v3": (671_026_419_200, 36_625_618_432, 11_610_068_224, 684_489_845_504, 70_272),
    "deepseek-v2": (235_741_434_880, 20_851_512_320, 0, 235_741_434_880, 69_120),
    "deepseek-v2-lite": (15_706_484_224, 2_451_435_008, 0, 15_706_484_224, 31_104),
    "moonlight": (15_960_110_208, 2_579_231_872, 0, 15_960_110_208, 31_104),
    "kimi-k2": (1_026_408_232_448, 31_687_095_808, 0, 1_026_408_232_448, 70_272),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_json_gives_the_published_integers(name: str, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    counts = facts["parameters"]
    shown = (*(counts[key] for key in ("total", "active", "mtp", "checkpoint")), facts["cache_bytes_per_token"])
    assert shown == PUBLISHED[name]


def test_the_table_says_the_same(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "deepseek-v3"]) == 0
    out = capsys.readouterr().out
    for figure in ("671,026,419,200", "36,625,618,432", "11,610,068,224", "684,489,845,504", "688.6 GB in FP8"):
        assert figure in out
    assert "250,456" in out
    assert max(len(line) for line in out.splitlines()) <= 100


RECIPES = [path for path in sorted(PRESETS.glob("*.toml")) if "[model]" in path.read_text(encoding="utf-8")]
"""Those of post-training take the model of the checkpoint that they go on from."""


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_that_ships_is_counted(recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["mtp"] > 0


REFUSED = [
    ({"model_type": "qwen2"}, "model_type 'qwen2'"),
    ({"index_topk": 2048}, "index_topk 2048"),
    ({"qk_rope_head_dim": 63, "qk_nope_head_dim": 129}, "qk_rope_head_dim 63"),
    ({"num_experts_per_tok": 65}, "num_experts_per_tok 65"),
    ({"n_group": 7, "topk_group": 1}, "n_group 7"),
    ({"hiden_size": 1}, "did you mean hidden_size?"),
    ({"vocab_size": None}, "the key vocab_size is missing"),
]


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_a_bad_config_is_one_line_and_code_2(
    change: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**load_config("moonlight").to_dict(), **change}))
    assert main(["inspect", str(path), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"fireflyer: {path}: ")
    assert named in err
