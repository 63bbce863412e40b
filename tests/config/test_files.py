"""A CONFIG of every kind is found; what can't be read is named with its place."""

import json
from pathlib import Path

import pytest

from fireflyer.config import load_config
from fireflyer.errors import UserError

RELEASED_V3 = json.loads((Path(__file__).parent / "released_v3.json").read_text())


def write_config(folder: Path, vocab_size: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**RELEASED_V3, "vocab_size": vocab_size})
    (folder / "config.json").write_text(text, encoding="utf-8-sig")  # as some Windows editors save it
    return folder


def test_every_kind_of_config_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = write_config(tmp_path / "checkpoint", 7)
    assert load_config(checkpoint).vocab_size == 7
    assert load_config(str(checkpoint / "config.json")).vocab_size == 7
    # A folder goes before a preset of that name.
    monkeypatch.chdir(tmp_path)
    checkpoint.rename("moonlight")
    assert load_config("moonlight").vocab_size == 7


def test_a_run_folder_means_its_newest_checkpoint_and_before_the_first_its_recipe(tmp_path: Path):
    scalars = {key: value for key, value in RELEASED_V3.items() if isinstance(value, (bool, int, float))}
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in scalars.items())
    (tmp_path / "recipe.toml").write_text(f"steps = 3\n[model]\n{table}\n")
    assert load_config(tmp_path).vocab_size == RELEASED_V3["vocab_size"]
    assert load_config(tmp_path / "recipe.toml") == load_config(tmp_path)
    for step in (90, 120, 60):
        write_config(tmp_path / "checkpoints" / f"step-{step:08}", step)
    assert load_config(tmp_path).vocab_size == 120


def test_the_shipped_v3_is_the_released_one():
    shipped = load_config("deepseek-v3").to_dict()
    assert shipped == {key: RELEASED_V3.get(key) for key in shipped}
    assert RELEASED_V3.keys() - shipped.keys() == {
        "auto_map",
        "ep_size",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }


BROKEN_FILES = {
    "config.json": ('{\n  "vocab_size": 5,\n  oops\n}', "line 3 column 3"),
    "list.json": ("[1]", "not a JSON object"),
    "broken.toml": ("[model\n", "line 1"),
    "empty.toml": ("steps = 1\n", "no [model] table"),
    "model.bin": ("", "not a config.json and not a recipe"),
    "latin.json": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 text (byte 7)"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_named_with_the_place(name: str, tmp_path: Path):
    content, expected = BROKEN_FILES[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_an_unknown_name_gets_the_nearest_preset_and_the_list(tmp_path: Path):
    with pytest.raises(UserError, match=r"'deepseek-v2-light' .*did you mean deepseek-v2-lite\?.*kimi-k2"):
        load_config("deepseek-v2-light")
    with pytest.raises(UserError, match="no file or folder"):
        load_config("../presets/kimi-k2")
    with pytest.raises(UserError, match="neither a checkpoint"):
        load_config(tmp_path)
