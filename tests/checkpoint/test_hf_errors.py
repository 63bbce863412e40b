"""Everything that can be wrong with a checkpoint or a destination: one line that names it, and nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_models import edit_config, own_model, same_bytes
from safetensors.torch import load_file, save_file

from fireflyer import UserError, load_model, save_model
from fireflyer.checkpoint import hf
from fireflyer.checkpoint.hf import resolve_checkpoint
from fireflyer.checkpoint.run import write_checkpoint

Tensors = dict[str, torch.Tensor]
HEAD_COPY = "model.layers.3.shared_head.head.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(own_model(), folder / "one")
    save_model(own_model(), folder / "many", max_shard_bytes=40_000)
    return folder


def refused(path: Path) -> str:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert sorted(path.parent.rglob("*")) == before
    return message


def replace(name: str, tensor: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


DAMAGES: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "missing": (lambda tensors: tensors.pop(EXPERT), [f"{EXPERT} is missing", "config.json asks for"]),
    "many missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.2." in name],
        ["model.layers.2.input_layernorm.weight (and 37 more) is missing"],
    ),
    "bias missing": (lambda tensors: tensors.pop(BIAS), [f"{BIAS} is missing"]),
    "extra": (replace("model.layers.1.mlp.extra", torch.ones(2)), ["'model.layers.1.mlp.extra' has no place"]),
    "extra with line break": (replace("a\nb", torch.ones(2)), [r"'a\nb' has no place"]),
    "stray of another name": (
        replace("model.layers.1.self_attn.rotary_emb.inv_freqs", torch.ones(2)),
        ["'model.layers.1.self_attn.rotary_emb.inv_freqs' has no place"],
    ),
    "a layer beyond counting": (
        replace(f"model.layers.{'9' * 5000}.x", torch.ones(2)),
        ["'model.layers.9999", "has no place"],
    ),
    "stray of a layer that isn't": (
        replace("model.layers.9.self_attn.rotary_emb.inv_freq", torch.ones(2)),
        ["'model.layers.9.self_attn.rotary_emb.inv_freq' has no place", "layers end at 3"],
    ),
    "misshaped": (replace(EXPERT, torch.ones(32, 16)), [EXPERT, "shape (32, 16)", "makes it (16, 32)"]),
    "transposed vector": (replace(BIAS, torch.ones(8, 1)), [BIAS, "shape (8, 1)", "makes it (8,)"]),
    "integers": (replace(EXPERT, torch.ones(16, 32, dtype=torch.int8)), [f"{EXPERT} is int8 (16, 32)", "convert"]),
    "doubles": (replace(EXPERT, torch.ones(16, 32, dtype=torch.float64)), [f"{EXPERT} is float64"]),
    "MTP partly absent": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.3.mlp" in name],
        ["model.layers.3.mlp.gate.weight (and ", "is missing"],
    ),
    "MTP without its copies": (lambda tensors: tensors.pop(HEAD_COPY), [f"{HEAD_COPY} is missing"]),
    "MTP's head differs": (
        lambda tensors: tensors[HEAD_COPY].view(torch.int32)[63, 31].add_(1),
        [f"{HEAD_COPY} differs from lm_head.weight", "make the copy equal"],
    ),
    "MTP's embedding differs": (
        replace("model.layers.3.embed_tokens.weight", torch.zeros(64, 32)),
        ["model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight"],
    ),
    "MTP's head in another dtype differs": (
        lambda tensors: tensors.update({HEAD_COPY: tensors[HEAD_COPY].bfloat16()}),
        [f"{HEAD_COPY} differs"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(saved / "one", folder)
    change, expected = DAMAGES[damage]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder)
    assert all(part in message for part in [str(folder), *expected]), message


def test_a_copy_in_another_dtype_with_the_same_values_is_equal(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "one", tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    tensors[HEAD_COPY] = tensors["lm_head.weight"].float()
    save_file(tensors, file)
    assert same_bytes(load_model(tmp_path / "c").lm_head.weight.data, tensors[HEAD_COPY])


def test_mtp_tensors_that_the_config_does_not_declare(saved: Path, tmp_path: Path) -> None:
    for declared in (0, None):
        folder = tmp_path / f"declared-{declared}"
        shutil.copytree(saved / "one", folder)
        edit_config(folder, num_nextn_predict_layers=declared)
        message = refused(folder)
        assert "'model.layers.3.eh_proj.weight' (and 43 more) has no place" in message
        assert "set num_hidden_layers or num_nextn_predict_layers" in message


def test_a_tied_head_that_differs(tmp_path: Path) -> None:
    save_model(own_model(tie_word_embeddings=True), tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(64, 32)}, file)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(tmp_path / "c")
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(64, 31)}, file)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(tmp_path / "c")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


SHARD = "model-00002-of-00009.safetensors"
INDEX = "model.safetensors.index.json"
FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "shard missing": (lambda folder: (folder / SHARD).unlink(), [SHARD, "missing, though", "download it again"]),
    "shard cut short": (lambda folder: truncate(folder / SHARD), [SHARD, "its header promises"]),
    "shard empty": (lambda folder: (folder / SHARD).write_bytes(b""), [SHARD, "cut short (0 bytes)"]),
    "shard is no safetensors file": (lambda folder: (folder / SHARD).write_bytes(b"<html>" * 99), [SHARD, "cut short"]),
    "index names a tensor that its shard lacks": (
        edit_index(lambda weight_map: weight_map.update({EXPERT: SHARD})),
        [SHARD, f"'{EXPERT}' isn't in it, though {INDEX} says so"],
    ),
    "a tensor in two shards": (
        lambda folder: save_file(load_file(folder / SHARD) | {BIAS: torch.ones(8)}, folder / SHARD),
        [SHARD, f"'{BIAS}' is in it and in 'model-0000", "get both anew"],
    ),
    "index leaves a tensor out": (
        edit_index(lambda weight_map: weight_map.pop(EXPERT)),
        [f"holds '{EXPERT}', which {INDEX} doesn't list"],
    ),
    "index leads out of the folder": (
        edit_index(lambda weight_map: weight_map.update({EXPERT: "../c/" + SHARD})),
        [INDEX, f"'../c/{SHARD}', which isn't in its folder"],
    ),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), [INDEX, "no weight_map"]),
    "index with numbers": (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 1}}'), ["no weight_map"]),
    "index isn't JSON": (lambda folder: (folder / INDEX).write_text("{"), [INDEX, "broken JSON at line 1"]),
    "no index": (lambda folder: (folder / INDEX).unlink(), ["model-00001-of-00009.safetensors is there, but neither"]),
    "one file and an index": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ["both model.safetensors and model.safetensors.index.json"],
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["neither config.json nor checkpoints/ is in it"]),
    "a config of another model": (
        lambda folder: edit_config(folder, model_type="qwen3"),
        ["config.json", "'qwen3'", "isn't supported"],
    ),
    "a config of other widths": (
        lambda folder: edit_config(folder, vocab_size=65),
        ["model.embed_tokens.weight has shape (64, 32), but config.json makes it (65, 32)"],
    ),
    "fewer layers in the config": (
        lambda folder: edit_config(folder, num_hidden_layers=2, num_nextn_predict_layers=0),
        ["'model.layers.2.", "layers end at 1"],
    ),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_damaged_folders(damage: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    shutil.copytree(saved / "many", folder)
    change, expected = FOLDERS[damage]
    change(folder)
    message = refused(folder)
    assert all(part in message for part in [str(folder), *expected]), message


def test_pickles_and_nothing_at_all(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    shutil.copy(saved / "one" / "config.json", folder)
    assert "no weights (model.safetensors, or" in refused(folder)
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert "pytorch_model.bin isn't read (opening it can run code); convert the weights" in refused(folder)


def test_what_a_path_means(saved: Path, tmp_path: Path) -> None:
    assert resolve_checkpoint(saved / "one") == saved / "one"
    with pytest.raises(UserError, match="absent: no such folder; give a checkpoint"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match=r"config\.json: a file, where a checkpoint is a folder"):
        resolve_checkpoint(saved / "one" / "config.json")
    with pytest.raises(UserError, match="an empty folder; give a checkpoint"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(UserError, match="can't be read"):
        resolve_checkpoint(tmp_path / ("long" * 999))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"no good checkpoint \(it has saved none yet\)"):
        resolve_checkpoint(tmp_path)

    def write(folder: Path) -> None:
        shutil.copytree(saved / "one", folder, dirs_exist_ok=True)

    older = write_checkpoint(tmp_path, 5, write)
    newer = write_checkpoint(tmp_path, 10, write)
    assert resolve_checkpoint(tmp_path) == newer
    assert resolve_checkpoint(older) == older
    truncate(newer / "model.safetensors")
    assert resolve_checkpoint(tmp_path) == older
    assert torch.equal(load_model(tmp_path).lm_head.weight, own_model().lm_head.weight)
    truncate(older / "model.safetensors")
    with pytest.raises(UserError, match=r"no good checkpoint \(the newest is damaged: .*step-00000010"):
        resolve_checkpoint(tmp_path)


def save_refused(path: Path, **options: object) -> str:
    before = sorted(path.parent.rglob("*")) if path.parent.is_dir() else []
    with pytest.raises(UserError) as caught:
        save_model(own_model(), path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert (sorted(path.parent.rglob("*")) if path.parent.is_dir() else []) == before
    return str(caught.value)


def test_destinations(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("keep me")
    assert "full: not empty, and nothing is overwritten" in save_refused(tmp_path / "full")
    assert "note: a file is there; give a new folder" in save_refused(tmp_path / "full" / "note")
    assert "can't be saved (Not a directory)" in save_refused(tmp_path / "full" / "note" / "deeper")
    assert "max_shard_bytes 0 isn't a size" in save_refused(tmp_path / "new", max_shard_bytes=0)
    assert "can't be saved (File name too long)" in save_refused(tmp_path / ("long" * 99))
    assert "no tokenizer.json" in save_refused(tmp_path / "new", tokenizer_from=tmp_path / "full")
    assert (tmp_path / "full" / "note").read_text() == "keep me"
    (tmp_path / "empty").mkdir()
    save_model(own_model(), tmp_path / "empty")
    save_model(own_model(), tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty", "full"]
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "a").stat().st_mode


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_leaves_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = hf.write_safetensors, []

    def fail_on_the_second(path: Path, *args: object) -> None:
        calls.append(path)
        real(path, *args)  # type: ignore[arg-type]
        if len(calls) == 2:
            raise OSError(number, "the reason", str(path))

    monkeypatch.setattr(hf, "write_safetensors", fail_on_the_second)
    message = save_refused(tmp_path / "new", max_shard_bytes=40_000)
    assert "new: can't be saved (the reason), and nothing was kept" in message
    assert ("free some space" in message) == (number != errno.EROFS)
    assert len(calls) == 2


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "plan_shards", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_model(own_model(), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_dtypes_that_hold_no_model(saved: Path, tmp_path: Path) -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(UserError, match=f"dtype {dtype} can't hold a model's weights"):
            load_model(saved / "one", dtype=dtype)
    with pytest.raises(UserError, match=r"torch.float64, which published files don't hold"):
        save_model(own_model().double(), tmp_path / "new")
    assert not list(tmp_path.iterdir())
