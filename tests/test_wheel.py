"""A wheel, built here and installed into a clean environment, is whole: commands run and every data file came along."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command in an environment that knows nothing of the source tree."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment with the wheel in it; its dependencies are lent by the running interpreter."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", "-qq", "--no-deps", "--no-index", wheel, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip())
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    where = run(python, "-c", "import fireflyer; print(fireflyer.__file__)", cwd=folder).stdout
    assert where.startswith(str(folder)), where
    return folder / "bin"


def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "fireflyer").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= held, sorted(wanted - held)
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
def test_native_kernels_came_along_and_load(wheel: Path, installed: Path, tmp_path: Path) -> None:
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl"), "with machine code a wheel is for one platform"
    program = "from fireflyer.numerics.native.library import library; found = library(); print(found and found.level)"
    done = run(installed / "python", "-c", program, cwd=tmp_path)
    assert done.stdout.strip() not in ("", "None"), done.stderr


def test_without_a_compiler_the_wheel_is_whole_and_for_every_platform(tmp_path: Path) -> None:
    """Built from a copy: the library of the source tree stays."""
    copy = tmp_path / "source"
    names = ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE")
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in names:
        shutil.copy(ROOT / name, copy / name)
    environment = {**os.environ, "CC": "no-such-compiler"}
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "without the native kernels" in done.stdout + done.stderr
    (path,) = tmp_path.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


def test_help(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "fireflyer", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in ("demo", "pretrain", "export", "inspect", "generate", "chat"):
        assert verb in done.stdout
    assert run(installed / "python", "-m", "fireflyer", "--help", cwd=tmp_path).stdout == done.stdout


# One shape (.json), one recipe (.toml) and the demo's. Published counts of the main model, gate biases included.
@pytest.mark.parametrize(
    ("preset", "total"), [("kimi-k2", 1_026_408_232_448), ("deepseek-v3", 671_026_419_200), ("spark", None)]
)
def test_shipped_preset_is_found(installed: Path, tmp_path: Path, preset: str, total: int | None) -> None:
    done = run(installed / "fireflyer", "inspect", preset, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout)["parameters"]["total"]
    assert counted > 0
    assert total is None or counted == total


def test_a_mistake_is_one_line(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "fireflyer", "inspect", "no-such-preset", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("fireflyer: ")
