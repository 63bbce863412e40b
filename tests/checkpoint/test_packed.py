"""Packed folders: what is written, that it is mapped and not read, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fireflyer import LLM, load_model, save_model
from fireflyer.checkpoint.packed import load_packed, pack_checkpoint, packed_kind, plan_packed
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.errors import UserError
from fireflyer.numerics.fp8 import quantize_block
from fireflyer.numerics.integer import expert_shapes, integers
from tests.published_models import own_model

KINDS = ("int8", "int4")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "model"
    save_model(own_model(), folder)
    return folder


def pack_folder(checkpoint: Path, folder: Path, kind: str) -> Path:
    folder.mkdir()
    opened = open_checkpoint(checkpoint)
    plan_packed(opened.config, opened.tensors, kind).write(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def packed(request, checkpoint, tmp_path_factory) -> Path:
    return pack_folder(checkpoint, tmp_path_factory.mktemp("packed") / request.param, request.param)


def test_a_folder_gives_the_model_packed_on_the_way_in(checkpoint, packed):
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    kind = packed_kind(packed)
    with torch.no_grad():
        found, expected = load_packed(packed)(ids), pack_checkpoint(open_checkpoint(checkpoint), kind)(ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.mtp_logits[0], expected.mtp_logits[0])


def test_int8_is_each_row_over_127(checkpoint, tmp_path):
    folder = pack_folder(checkpoint, tmp_path / "packed", "int8")
    own = load_file(checkpoint / "model.safetensors")
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    stored = {name: tensor for file in files for name, tensor in file.items()}
    place = "model.layers.1.mlp.experts"
    sizes = [shape.num_bytes for shape in expert_shapes("int8", 32, 16)]
    for expert in (0, 7):
        parts = stored[f"{place}.packed"][expert].split(sizes)
        for part, shape, name in zip(parts, expert_shapes("int8", 32, 16), ("gate", "up", "down"), strict=True):
            weight = own[f"{place}.{expert}.{name}_proj.weight"]
            values, scales = integers(part, shape)
            for row, value, scale in zip(weight, values, scales, strict=True):
                assert scale == row.abs().max() / 127
                assert value.tolist() == (row / scale).round().tolist()


def test_fp8_checkpoints_are_packed_from_their_dequantised_weights(checkpoint, tmp_path):
    from safetensors.torch import save_file

    own = load_file(checkpoint / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    fp8, wide = tmp_path / "fp8", tmp_path / "wide"
    stored, plain = dict(own), dict(own)
    for name in [n for n in own if n.endswith("_proj.weight") and "eh_proj" not in n]:
        stored[name], stored[f"{name}_scale_inv"] = quantize_block(own[name], (16, 16))
        scale = stored[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
        plain[name] = stored[name].float() * scale[: own[name].shape[0], : own[name].shape[1]]
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}
    for folder, tensors, extra in ((fp8, stored, {"quantization_config": quantization}), (wide, plain, {})):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | extra))
    found, expected = (pack_checkpoint(open_checkpoint(f), "int4").state_dict() for f in (fp8, wide))
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def test_config_says_what_the_files_hold(packed):
    found = json.loads((packed / "config.json").read_text())["quantization_config"]
    kind = packed_kind(packed)
    assert found == {
        "quant_method": "fireflyer",
        "version": 1,
        "weights": kind,
        "latent_projections": "int8",
        "head": "int8",
        "kv_b_proj": "bf16",
        "embedding": "bf16",
        "gate": "fp32",
    }
    tensors = [load_file(path) for path in packed.glob("*.safetensors")]
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(name for file in tensors for name in file)
    total = sum(tensor.nbytes for file in tensors for tensor in file.values())
    assert index["metadata"]["total_size"] == total


def test_weights_are_mapped_where_they_lie(checkpoint, tmp_path):
    folder = pack_folder(checkpoint, tmp_path / "packed", "int8")
    model = load_packed(folder)
    path = next(p for p in folder.glob("*.safetensors") if "model.norm.weight" in load_file(p))
    bytes_ = bytearray(path.read_bytes())
    own = model.model.norm.weight
    start = bytes_.index(own.detach().numpy().tobytes())
    with path.open("r+b") as file:
        file.seek(start)
        file.write(torch.full_like(own, 7.0).detach().numpy().tobytes())
    assert (own == 7).all()
    assert own.data_ptr() % 4 == 0


def test_files_are_laid_out_for_wide_registers(packed):
    for path in packed.glob("*.safetensors"):
        assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda config, tensors: config["quantization_config"].update(weights="int3"), "isn't a packed format"),
        (lambda config, tensors: config["quantization_config"].update(version=2), "isn't a packed format"),
        (lambda config, tensors: tensors.pop("lm_head.packed"), "lm_head.packed is missing"),
        (
            lambda config, tensors: tensors.update({"model.extra": torch.zeros(1)}),
            "'model.extra' has no place in the model",
        ),
        (
            lambda config, tensors: config.update(vocab_size=128),
            r"embed_tokens.weight is torch.bfloat16 \(64, 32\), but",
        ),
    ],
)
def test_a_spoilt_folder_is_told_by_name(checkpoint, tmp_path, spoil, expected):
    folder = pack_folder(checkpoint, tmp_path / "packed", "int8")
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor for path in folder.glob("model-*") for name, tensor in load_file(path).items()}
    for path in [*folder.glob("model-*"), folder / "model.safetensors.index.json"]:
        path.unlink()
    spoil(config, tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=expected):
        load_packed(folder)


def test_a_torn_file_is_refused(packed, tmp_path):
    import shutil

    folder = Path(shutil.copytree(packed, tmp_path / "torn"))
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{path.name}.*promises"):
        load_packed(folder)


def test_weights_that_no_scale_can_hold_are_told_by_name(checkpoint, tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "nan"
    folder.mkdir()
    (folder / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: model\.layers\.2\.self_attn\.o_proj\.weight: can't be"):
        pack_checkpoint(open_checkpoint(folder), "int8")


def test_packed_weights_are_for_running(packed):
    with pytest.raises(UserError, match="packed as integers, which is for running"):
        open_checkpoint(packed)
    other = "int4" if packed_kind(packed) == "int8" else "int8"
    with pytest.raises(UserError, match=f"{other} ones can't be made"):
        LLM(packed, quantization=other)
    with pytest.raises(UserError, match="go with float32"):
        LLM(packed, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="packed as integers"):
        load_model(packed)


def test_an_unknown_kind_is_refused(checkpoint):
    with pytest.raises(UserError, match=r"quantization is 'int2'; it must be one of int8, int4"):
        LLM(checkpoint, quantization="int2")
