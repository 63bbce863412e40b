"""What a GGUF file can have wrong, each named: another model, cut short, unknown quantisation, missing tensors."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_files import WIDTHS, gguf_tensors, write_gguf
from published_models import own_model

from fireflyer import UserError, load_model

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    write_gguf(path, own_model(**WIDTHS, num_hidden_layers=2))
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 20, 200, 5000, -1])
def test_cut_short(good: Path, size: int, tmp_path: Path) -> None:
    whole = good.read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:size])
    refused(tmp_path / "x.gguf", "cut short" if size not in (0, 3, 20) else "not a GGUF file")


def test_another_architecture(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "x.gguf", "architecture 'llama' isn't supported; only deepseek2 is")


def test_big_endian_and_other_versions(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    for version, message in ((3 << 24, "big-endian"), (1, "GGUF version 1 isn't read"), (9, "GGUF version 9")):
        (tmp_path / "x.gguf").write_bytes(whole[:4] + version.to_bytes(4, "little") + whole[8:])
        refused(tmp_path / "x.gguf", message)
    (tmp_path / "y.gguf").write_bytes(b"PK\3\4" + whole[4:])
    refused(tmp_path / "y.gguf", "not a GGUF file")


def test_unknown_quantisation(good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    place = whole.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8  # one dimension, then the type
    for number, label in ((99, "99"), (9, "Q8_1")):
        (tmp_path / "x.gguf").write_bytes(whole[:place] + number.to_bytes(4, "little") + whole[place + 4 :])
        refused(
            tmp_path / "x.gguf", f"'output_norm.weight' is quantised as {label}, which isn't read; known are .*Q4_K"
        )


CHANGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("blk.1.ffn_down_exps.weight"), "blk.1.ffn_down_exps.weight is missing"),
    "half of kv_b": (lambda t: t.pop("blk.0.attn_v_b.weight"), "blk.0.attn_kv_b.weight is missing"),
    "gate bias": (lambda t: t.pop("blk.2.exp_probs_b.bias"), "blk.2.exp_probs_b.bias is missing"),
    "superfluous": (
        lambda t: t.update({"blk.0.attn_q.bias": np.ones(4, np.float32)}),
        "'blk.0.attn_q.bias' has no place",
    ),
    "shape": (
        lambda t: t.update({"blk.0.attn_norm.weight": np.ones(96, np.float32)}),
        r"blk.0.attn_norm.weight has shape \(96,\), but the metadata makes it \(64,\)",
    ),
    "stack": (
        lambda t: t.update({"blk.1.ffn_up_exps.weight": t["blk.1.ffn_up_exps.weight"][:3]}),
        r"blk.1.ffn_up_exps.weight has shape \(3, 32, 64\), but the metadata makes it \(4, 32, 64\)",
    ),
    "another head": (
        lambda t: t.update({"blk.2.nextn.shared_head_head.weight": t["output.weight"] + 1}),
        "blk.2.nextn.shared_head_head.weight differs from output.weight",
    ),
    "no embedding": (lambda t: t.pop("token_embd.weight"), "token_embd.weight isn't in it"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit(change: str, tmp_path: Path) -> None:
    model = own_model(**WIDTHS, num_hidden_layers=2)
    tensors = gguf_tensors(model)
    damage, message = CHANGES[change]
    damage(tensors)
    write_gguf(tmp_path / "x.gguf", model, tensors)
    refused(tmp_path / "x.gguf", message)


def test_metadata_that_are_missing(tmp_path: Path) -> None:
    model = own_model(**WIDTHS, num_hidden_layers=2)
    write_gguf(tmp_path / "x.gguf", model, leave_out=("kv_lora_rank",))
    refused(tmp_path / "x.gguf", "its metadata has no deepseek2.attention.kv_lora_rank")


def test_a_part_that_is_missing(good: Path, tmp_path: Path) -> None:
    part = tmp_path / "m-00002-of-00003.gguf"
    part.write_bytes(good.read_bytes())
    with pytest.raises(UserError, match=r"m-00001-of-00003\.gguf: missing, one of 00003 parts"):
        load_model(part)


def test_without_the_package(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.partition(".")[0] == "gguf":
            raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
        return real(name, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.delitem(sys.modules, "gguf")
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install 'fireflyer\[gguf\]'"):
        load_model(good)
