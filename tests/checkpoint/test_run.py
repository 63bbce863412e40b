"""Checkpoints on disk: whole or absent, verified, the last N kept, whatever the disk or a kill does."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fireflyer.checkpoint import run
from fireflyer.checkpoint.run import (
    damage,
    discard_newer,
    find_checkpoint,
    keep_newest,
    newest_good_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from fireflyer.checkpoint.writer import CheckpointWriter
from fireflyer.errors import UserError


def two_files(folder: Path, text: str = "weights") -> None:
    (folder / "model.safetensors").write_text(text)
    (folder / "trainer.json").write_text("{}")


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def test_manifest_states_every_file(tmp_path: Path):
    path = write_checkpoint(tmp_path, 60, two_files, recipe_sha256="abc")
    assert path == tmp_path / "checkpoints" / "step-00000060"
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "trainer.json"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 60
    assert manifest["recipe_sha256"] == "abc"
    expected = {"bytes": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert manifest["files"]["model.safetensors"] == expected
    assert damage(path) is None
    assert newest_good_checkpoint(tmp_path) == path


def test_no_checkpoint_in_a_new_run(tmp_path: Path):
    assert newest_good_checkpoint(tmp_path) is None
    assert newest_good_checkpoint(tmp_path / "absent") is None


def flip_byte(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weighTs")


def cut_short(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weigh")


def lose_file(path: Path) -> None:
    (path / "trainer.json").unlink()


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def tear_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(text[: len(text) // 2])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def other_step(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"step": 20', '"step": 10'))


HARMS = {
    flip_byte: "model.safetensors has another sha256",
    cut_short: "model.safetensors has 5 bytes, not 7",
    lose_file: "trainer.json is missing",
    lose_manifest: "manifest.json is missing",
    tear_manifest: "manifest.json can't be used",
    empty_manifest: "manifest.json can't be used",
    other_step: "another checkpoint",
}


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_a_damaged_checkpoint_is_passed_over_and_named(harm, tmp_path: Path):
    good = write_checkpoint(tmp_path, 10, two_files)
    bad = write_checkpoint(tmp_path, 20, two_files)
    harm(bad)
    found = find_checkpoint(tmp_path)
    assert found.path == good
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith(f"{bad}: ")
    assert HARMS[harm] in found.damaged[0]


def test_all_damaged(tmp_path: Path):
    for step in (10, 20):
        cut_short(write_checkpoint(tmp_path, step, two_files))
    found = find_checkpoint(tmp_path)
    assert found.path is None
    assert len(found.damaged) == 2


def test_steps_sort_as_numbers(tmp_path: Path):
    for step in (99_999_999, 100_000_000, 5):
        write_checkpoint(tmp_path, step, two_files)
    newest = newest_good_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-100000000"


def test_last_n_kept_and_nothing_else(tmp_path: Path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, two_files)
        keep_newest(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_discard_newer_takes_only_later_steps(tmp_path: Path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, two_files)
    discard_newer(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    cut_short(write_checkpoint(tmp_path, 4, two_files))
    path = write_checkpoint(tmp_path, 4, lambda folder: two_files(folder, "newer"))
    assert damage(path) is None
    assert (path / "model.safetensors").read_text() == "newer"
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000004"]


def test_leftovers_of_killed_saves_are_never_taken_and_are_removed(tmp_path: Path):
    good = write_checkpoint(tmp_path, 1, two_files)
    whole = write_checkpoint(tmp_path, 2, two_files)
    whole.rename(whole.with_name(".saving-step-00000002"))  # killed just before the rename
    (tmp_path / "checkpoints" / ".deleted-step-00000000").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()  # not ours
    assert newest_good_checkpoint(tmp_path) == good
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["notes", "step-00000001"]


def test_name_appears_only_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The order on disk: every file synced, the manifest, the folder, the rename, the folder above."""
    done: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        done.append(f"rename {self.name}")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    write_checkpoint(tmp_path, 3, two_files)
    part = ".saving-step-00000003"
    assert done == [
        "sync model.safetensors",
        "sync trainer.json",
        "sync .manifest.json.part",
        f"sync {part}",  # the manifest's own rename
        f"sync {part}",
        f"rename {part}",
        "sync checkpoints",
        f"sync {tmp_path.name}",
    ]


@pytest.mark.parametrize("call", range(1, 8))
def test_full_disk_at_any_write_leaves_the_old_checkpoint(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = write_checkpoint(tmp_path, 1, two_files)
    calls = 0
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        UserError, match=r"step-00000002 can't be saved: No space left.* step-00000001 is untouched"
    ) as e:
        write_checkpoint(tmp_path, 2, two_files)
    assert "\n" not in str(e.value)
    monkeypatch.undo()
    assert damage(old) is None
    assert not [name for name in names(tmp_path) if name.startswith(".saving")]


def write_large(folder: Path) -> None:
    two_files(folder)
    save_file({"weight": torch.zeros(1 << 20)}, folder / "large.safetensors")


def test_really_full_disk(tmp_path: Path):
    """A file system of 1 MiB where this user may mount one, else a limit on a file's size in a child process."""
    run_dir = tmp_path / "disk"
    run_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(run_dir)]
    mounted = (
        hasattr(os, "geteuid") and os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        old = write_checkpoint(run_dir, 1, two_files)
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        with pytest.raises(
            UserError, match=r"step-00000002 can't be saved: .*(No space left|File too large).*untouched"
        ):
            write_checkpoint(run_dir, 2, write_large)
        assert newest_good_checkpoint(run_dir) == old
        assert names(run_dir) == ["step-00000001"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
        if mounted:
            subprocess.run(["umount", str(run_dir)], check=True)


def test_kill_during_save_leaves_the_old_checkpoint(tmp_path: Path):
    """SIGKILL from within the save, after the files and before the manifest: the folder never bears its name."""
    old = write_checkpoint(tmp_path, 1, two_files)
    code = (
        "import os, signal, sys, pathlib\n"
        "from fireflyer.checkpoint.run import write_checkpoint\n"
        "def write(folder):\n"
        "    (folder / 'model.safetensors').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_checkpoint(pathlib.Path(sys.argv[1]), 2, write)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / ".saving-step-00000002" / "model.safetensors").read_text() == "half"
    assert newest_good_checkpoint(tmp_path) == old
    write_checkpoint(tmp_path, 2, two_files)  # the next save of that step isn't stopped by what lies there
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_writer_is_asynchronous_with_one_save_in_flight(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, keep=2)
    gate, began = threading.Event(), []

    def slow(folder: Path) -> None:
        began.append(folder.name)
        gate.wait(10)
        two_files(folder)

    writer.save(1, slow)
    assert writer.finished() == []  # returned while the save is still going on
    second = threading.Thread(target=writer.save, args=(2, slow))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # waits for the first
    assert began == [".saving-step-00000001"]
    gate.set()
    second.join(10)
    writer.wait()
    assert [saved.step for saved in writer.finished()] == [1, 2]
    assert writer.finished() == []
    for step in (3, 4):
        writer.save(step, two_files)
    writer.wait()
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_writer_raises_the_error_of_its_thread_once(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, two_files)
    writer.wait()

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    writer.save(2, fails)
    with pytest.raises(UserError, match="step-00000001 is untouched"):
        writer.wait()
    writer.wait()
    assert names(tmp_path) == ["step-00000001"]


def test_old_checkpoint_is_deleted_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, two_files)
    writer.wait()
    seen: list[list[str]] = []
    monkeypatch.setattr(run.shutil, "rmtree", lambda path, **_: seen.append(names(tmp_path)))
    writer.save(2, two_files)
    writer.wait()
    assert seen[0] == [".deleted-step-00000001", "step-00000002"]  # renamed before anything in it goes
