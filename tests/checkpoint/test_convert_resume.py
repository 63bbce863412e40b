"""A conversion stopped anywhere goes on to the bytes of one that never was; and what it refuses, it leaves alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest
import torch
from fp8_checkpoint import Tensors, is_fp8, write_bf16, write_config, write_fp8, write_shards
from published_models import edit_config
from safetensors.torch import load_file, save_file

from fireflyer import UserError
from fireflyer.checkpoint import convert as module
from fireflyer.checkpoint.conversion_record import locked
from fireflyer.checkpoint.convert import Converted, Progress, convert
from fireflyer.checkpoint.published import resolve_checkpoint
from fireflyer.errors import Stopped

SHARD_BYTES = 300_000


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_fp8(folder / "fp8")
    write_bf16(folder / "bf16")
    return folder


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of rows is a step, and every step is saved."""
    monkeypatch.setattr("fireflyer.checkpoint.safetensors_file.CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(sources: Path, folder: Path, to: str, after: int | None = None) -> tuple[Converted | None, list[Progress]]:
    """Convert until done, or until so many steps were taken."""
    seen: list[Progress] = []
    source = sources / ("bf16" if to == "fp8" else "fp8")
    try:
        done = convert(
            source,
            folder,
            to,  # type: ignore[arg-type]
            max_shard_bytes=SHARD_BYTES,
            on_progress=seen.append,
            should_stop=lambda: len(seen) == after,
        )
    except Stopped:
        return None, seen
    return done, seen


@pytest.mark.parametrize("to", ["bf16", "fp8", "int8"])
def test_stopped_again_and_again(to: str, sources: Path, tmp_path: Path) -> None:
    done, steps = run(sources, tmp_path / "whole", to)
    assert done is not None
    starts = [0]
    while True:
        done, seen = run(sources, tmp_path / "often", to, after=max(3, len(steps) // 5))
        # Nothing is done twice: each start begins where the one before ended.
        if seen:
            starts.append(starts[-1] + len(seen))
        if done is not None:
            break
        with pytest.raises(UserError, match="a conversion that isn't finished"):
            resolve_checkpoint(tmp_path / "often")
    assert starts[-1] == len(steps)
    assert len(starts) > 4
    assert contents(tmp_path / "often") == contents(tmp_path / "whole")
    assert [p.done_bytes for p in steps] == sorted(p.done_bytes for p in steps)
    assert (
        steps[-1].done_bytes
        == steps[-1].total_bytes
        == sum(path.stat().st_size for path in (tmp_path / "whole").glob("*.safetensors"))
    )
    done, seen = run(sources, tmp_path / "often", to)
    assert done is not None
    assert done.already
    assert not seen


def test_killed_between_two_saves(sources: Path, tmp_path: Path) -> None:
    run(sources, tmp_path / "whole", "bf16")
    run(sources, tmp_path / "killed", "bf16", after=30)
    record = json.loads((tmp_path / "killed" / "conversion.json").read_text())
    # What a full disk has left for the record to say so.
    assert (tmp_path / "killed" / ".conversion.json.part").stat().st_size > 2 * len(json.dumps(record, indent=1))
    assert record["steps"] > 0
    part = tmp_path / "killed" / f"{record['file']}.part"
    earlier = tmp_path / "killed" / "conversion.json"
    # The record is older than the file, whose later bytes a power cut spoilt.
    earlier.write_text(json.dumps(record | {"steps": 1, "bytes": len(part.read_bytes()[: 1 << 12])}))
    with part.open("r+b") as file:
        file.seek(part.stat().st_size - 5000)
        file.write(b"\xff" * 5000)
    run(sources, tmp_path / "killed", "bf16")
    for name, data in contents(tmp_path / "whole").items():
        assert (tmp_path / "killed" / name).read_bytes() == data, name


def test_steps_of_another_size_are_not_gone_on_with(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(sources, tmp_path / "whole", "bf16")
    run(sources, tmp_path / "out", "bf16", after=20)
    monkeypatch.setattr("fireflyer.checkpoint.safetensors_file.CHUNK_BYTES", 1 << 20)
    run(sources, tmp_path / "out", "bf16")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_file_that_was_cut_or_removed_is_made_again(sources: Path, tmp_path: Path) -> None:
    run(sources, tmp_path / "out", "bf16")
    whole = contents(tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    files[0].unlink()
    os.truncate(files[1], 1000)
    done, seen = run(sources, tmp_path / "out", "bf16")
    assert done is not None
    assert not done.already
    assert {p.file for p in seen} == {1, 2}
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_the_disk_refuses(number: int, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(sources, tmp_path / "whole", "bf16")
    written = 0

    def write_at(out: FileIO, position: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 1_000_000:
            raise OSError(number, os.strerror(number))
        return real(out, position, data)

    real = module._write_at
    monkeypatch.setattr(module, "_write_at", write_at)
    with pytest.raises(UserError) as caught:
        run(sources, tmp_path / "out", "bf16")
    message = str(caught.value)
    assert f"{tmp_path / 'out'}/model-0000" in message
    assert "model.layers." in message
    assert f"can't be written ({os.strerror(number)})" in message
    assert ("free some space" in message) == (number != errno.EIO)
    assert "\n" not in message
    monkeypatch.setattr(module, "_write_at", real)
    _, seen = run(sources, tmp_path / "out", "bf16")
    assert seen[0].done_bytes > 900_000
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_too_little_room_is_told_before(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10**7, 0, 1_000_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"2,[0-9,]+ bytes more, and 1,000,000 are free there"):
        run(sources, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another size": (
        lambda source: (source / "tokenizer.json").write_text("{}   "),
        r"of another source: tokenizer.json has 5 bytes, and had \d+",
    ),
    "written anew": (
        lambda source: touch(source / "model-00002-of-00003.safetensors"),
        "model-00002-of-00003.safetensors was written anew since",
    ),
    "a file more": (lambda source: (source / "LICENSE").write_text("MIT"), "LICENSE is there now, and wasn't"),
    "a file less": (
        lambda source: (source / "chat_template.jinja").unlink(),
        "'chat_template.jinja' was read, and isn't there now",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_source_is_refused(change: str, finished: bool, sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "fp8", tmp_path / "fp8")
    run(tmp_path, tmp_path / "out", "bf16", after=None if finished else 9)
    before = contents(tmp_path / "out")
    edit, message = CHANGES[change]
    edit(tmp_path / "fp8")
    with pytest.raises(UserError, match=message):
        run(tmp_path, tmp_path / "out", "bf16")
    assert contents(tmp_path / "out") == before


def edit_record(folder: Path, **changes: object) -> None:
    path = folder / "conversion.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_conversion_is_refused(sources: Path, tmp_path: Path) -> None:
    run(sources, tmp_path / "out", "bf16", after=9)
    with pytest.raises(UserError, match="a conversion to 'bf16' was begun there, not to fp32"):
        run(sources, tmp_path / "out", "fp32")
    edit_record(tmp_path / "out", version=0)
    with pytest.raises(
        UserError, match=r"begun there by a fireflyer that converts otherwise \(version 0 of conversions, here 1\)"
    ):
        run(sources, tmp_path / "out", "bf16")
    edit_record(tmp_path / "out", version=1, max_shard_bytes=7)
    with pytest.raises(UserError, match="in files of 7 bytes, not 300000"):
        run(sources, tmp_path / "out", "bf16")
    for broken in ("{", "[]", '{"to": 5}', "{}"):
        (tmp_path / "out" / "conversion.json").write_text(broken)
        with pytest.raises(UserError, match="can't be read as a conversion's state"):
            run(sources, tmp_path / "out", "bf16")


def test_destinations(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("keep me")
    with pytest.raises(UserError, match=r"full: not empty, and no conversion\.json of an earlier start is in it"):
        run(sources, tmp_path / "full", "bf16")
    with pytest.raises(UserError, match="note: a file is there"):
        run(sources, tmp_path / "full" / "note", "bf16")
    with pytest.raises(UserError, match=r"deeper: can't be (used|written) \(Not a directory\)"):
        run(sources, tmp_path / "full" / "note" / "deeper", "bf16")
    for inside in (sources / "fp8", sources / "fp8" / "new"):
        with pytest.raises(UserError, match=r"lies within .*fp8, which is only read"):
            run(sources, inside, "bf16")
    assert (tmp_path / "full" / "note").read_text() == "keep me"
    assert not (sources / "fp8" / "new").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".conversion.json.part").write_text("{")  # what a kill within the first write leaves
    assert run(sources, tmp_path / "empty", "bf16")[0]


def test_a_read_only_destination(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"out: can't be written \(Read-only file system\)"):
        run(sources, tmp_path / "out", "bf16")


def test_two_at_once(sources: Path, tmp_path: Path) -> None:
    run(sources, tmp_path / "out", "bf16", after=9)
    with locked(tmp_path / "out"), pytest.raises(UserError, match="another process converts into it"):
        run(sources, tmp_path / "out", "bf16")
    assert run(sources, tmp_path / "out", "bf16")[0]


SCALE = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"
LAST = "model-00003-of-00003.safetensors"


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a scale missing": (
        lambda folder: rewrite(folder, lambda tensors: tensors.pop(SCALE)),
        ["model-0000", "experts.3.down_proj.weight' is FP8, but its scales"],
    ),
    "a scale misshaped": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({SCALE: torch.ones(5, 1)})),
        [LAST, "the scales of 'model.layers.1.mlp.experts.3.down_proj.weight' are float32 (5, 1)"],
    ),
    "a shard missing": (lambda folder: (folder / LAST).unlink(), [LAST, "missing"]),
    "a shard cut short": (lambda folder: os.truncate(folder / LAST, 9000), [LAST, "the file has 9000"]),
    "V3.2": (lambda folder: edit_config(folder, model_type="deepseek_v32"), ["'deepseek_v32' isn't supported", "V3.1"]),
    "V4": (lambda folder: edit_config(folder, model_type="deepseek_v4"), ["'deepseek_v4' isn't supported"]),
    "a distilled Llama": (lambda folder: edit_config(folder, model_type="llama"), ["a Llama model (the R1 distills"]),
    "a distilled Qwen": (lambda folder: edit_config(folder, model_type="qwen2"), ["a Qwen model (the R1 distills"]),
}


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Change the shard of the scales, the index with it."""
    tensors = load_file(folder / LAST)
    change(tensors)
    save_file(tensors, folder / LAST)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    kept = {name: shard for name, shard in index["weight_map"].items() if shard != LAST or name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": kept}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_before_anything_is_written(damage: str, sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "fp8", tmp_path / "fp8")
    change, expected = DAMAGES[damage]
    change(tmp_path / "fp8")
    with pytest.raises(UserError) as caught:
        run(tmp_path, tmp_path / "out", "bf16")
    assert all(part in str(caught.value) for part in expected), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_source_that_breaks_on_the_way_keeps_what_is_done(sources: Path, tmp_path: Path) -> None:
    weights = load_file(sources / "bf16" / "model-00001-of-00002.safetensors")
    weights |= load_file(sources / "bf16" / "model-00002-of-00002.safetensors")
    bad = [name for name in sorted(weights) if is_fp8(name)][-1]
    weights[bad] = torch.full_like(weights[bad], float("nan"))
    write_shards(tmp_path / "c", [weights])
    write_config(tmp_path / "c")
    with pytest.raises(UserError, match=f"{bad}: can't be packed: the weight holds NaN"):
        convert(tmp_path / "c", tmp_path / "out", "int8")
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["file"]
