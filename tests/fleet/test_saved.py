"""What a run folder shows to be saved, whatever the job says: real checkpoints, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from fireflyer.checkpoint.run import write_checkpoint
from fireflyer.fleet import saved
from fireflyer.fleet.saved import newest_saved


def save(run_dir: Path, step: int) -> Path:
    return write_checkpoint(run_dir, step, lambda folder: (folder / "model.bin").write_bytes(b"x" * 1000) and None)


@pytest.mark.parametrize("hashed", [True, False])
def test_newest_whole_checkpoint(hashed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A torn one is passed over and named (pain 10); a large one is held against its sizes only."""
    if not hashed:
        monkeypatch.setattr(saved, "HASHED_UP_TO_BYTES", 0)
    assert newest_saved(tmp_path / "none") == saved.Saved(None, None, None)
    save(tmp_path, 3)
    newest = save(tmp_path, 7)
    found = newest_saved(tmp_path)
    assert (found.step, found.damage) == (7, None)
    assert found.at == (newest / "manifest.json").stat().st_mtime
    (newest / "model.bin").write_bytes(b"x" * 999)
    found = newest_saved(tmp_path)
    assert found.step == 3
    assert "step-00000007: model.bin" in (found.damage or "")
    (newest / "model.bin").write_bytes(b"y" * 1000)
    assert newest_saved(tmp_path).step == (3 if hashed else 7)
    newest.rename(newest.with_name("step-00000009"))  # a copy under another name is not that step's
    assert newest_saved(tmp_path).step == 3
    (newest.with_name("step-00000009") / "manifest.json").unlink()
    assert newest_saved(tmp_path).step == 3
