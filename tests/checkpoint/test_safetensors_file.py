"""Our reader and writer against the safetensors library, byte by byte, and against every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from published_models import same_bytes
from safetensors.torch import load, load_file, save, save_file

from fireflyer import UserError
from fireflyer.checkpoint import safetensors_file
from fireflyer.checkpoint.safetensors_file import read_header, write_safetensors


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(7, 3, generator=generator),
        "a.weight": torch.randn(5, 3, generator=generator).bfloat16(),
        "c.bias": torch.randn(3, generator=generator),
        "deep": torch.randn(2, 3, 4, generator=generator),
        "empty": torch.empty(0, 4),
        "ü": torch.randn(2, 2, generator=generator).bfloat16(),
    }


def test_the_librarys_bytes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "ours", example())
    assert (tmp_path / "ours").read_bytes() == save(example(), metadata={"format": "pt"})


def test_rounding_on_the_way_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "CHUNK_BYTES", 2 * 3 * 4)
    write_safetensors(tmp_path / "ours", example(), {"b.weight": torch.bfloat16, "a.weight": torch.float32})
    read = load_file(tmp_path / "ours")
    assert same_bytes(read["b.weight"], example()["b.weight"].bfloat16())
    assert same_bytes(read["a.weight"], example()["a.weight"].float())
    assert same_bytes(read["deep"], example()["deep"])


def test_views_that_share_memory_and_transposes_are_written_right(tmp_path: Path) -> None:
    stacked = torch.arange(24.0).view(2, 4, 3)
    tensors = {"up": stacked[1, 2:], "gate": stacked[1, :2], "turned": stacked[0].t()}
    write_safetensors(tmp_path / "ours", tensors)
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_reading_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = {
        **example(),
        "scalar": torch.tensor(3.5),
        "f8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "i64": torch.arange(5),
        "flag": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "theirs", metadata={"note": "anything"})
    stored = read_header(tmp_path / "theirs")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bytes(stored[name].read(), tensor), name
    assert torch.equal(stored["b.weight"][2:5], tensors["b.weight"][2:5])
    assert stored["b.weight"][9:12].shape == (0, 3)


def test_the_file_ends_while_reading(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "f", {"a": torch.ones(100, 100)})
    stored = read_header(tmp_path / "f")["a"]
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="cut short within a; copy or download it again"):
        stored.read()
    (tmp_path / "f").unlink()
    with pytest.raises(UserError, match="can't be read"):
        stored.read()


@given(cut=st.integers(0, 10_000))
def test_every_cut_is_noticed(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = save(example())
    path = tmp_path_factory.mktemp("cut") / "f.safetensors"
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_changed_header_never_crashes(position: int, value: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the reader accepts, the library accepts too, with the same values."""
    changed = bytearray(save(example()))
    length = int.from_bytes(changed[:8], "little")
    changed[position % (8 + length)] = value
    path = tmp_path_factory.mktemp("changed") / "f.safetensors"
    path.write_bytes(changed)
    try:
        stored = read_header(path)
    except UserError:
        return
    theirs = load(bytes(changed))
    assert stored.keys() == theirs.keys()
    assert all(same_bytes(stored[name].read(), theirs[name]) for name in theirs)


HEADERS: dict[str, tuple[object, str]] = {
    "a list": ([], "no table of tensors"),
    "an entry that is no table": ({"a": 3}, "no byte range for tensor 'a'"),
    "a negative range": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "no byte range"),
    "another dtype": ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, "dtype 'F4', which isn't read"),
    "a shape that doesn't fit": (
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        "bytes 0 to 8 don't fit tensor 'a'",
    ),
    "a negative shape": ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, "don't fit tensor 'a'"),
    "overlapping": (
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        "bytes 4 to 8 don't fit tensor 'b'",
    ),
    "a hole": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "bytes 4 to 8 don't fit"),
    "bytes left over": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "promises .* the file has"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(case: str, tmp_path: Path) -> None:
    header, message = HEADERS[case]
    encoded = json.dumps(header).encode()
    (tmp_path / "f").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(8))
    with pytest.raises(UserError, match=message):
        read_header(tmp_path / "f")


def test_what_is_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="a Git LFS pointer, not the weights; fetch them with git lfs pull"):
        read_header(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"PK\3\4 a pickle in a zip archive")
    with pytest.raises(UserError, match="not a safetensors file, or cut short"):
        read_header(tmp_path / "f")
    (tmp_path / "f").write_bytes((10**6).to_bytes(8, "little") + b"[" * 10**6)
    with pytest.raises(UserError, match="its safetensors header isn't JSON"):
        read_header(tmp_path / "f")
    with pytest.raises(UserError, match="can't be read"):
        read_header(tmp_path / "absent")
