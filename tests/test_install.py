"""scripts/install.sh and .ci/run on other machines: each foreign program is a stub that writes down its words."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STUB_PYTHON = """#!/bin/sh
echo "env $*" >>"{log}"
case "$*" in
"-m pip --version") exit {pip_missing} ;;
*importlib*torch*) cat "{torch}" ;;
*"install -qq torch"*) printf 2.13.0 >"{torch}" ;;
*--constraint*)
    file=$(echo "$*" | sed 's/.*--constraint \\([^ ]*\\).*/\\1/')
    sed "s/^/constraint /" "$file" >>"{log}" ;;
esac
"""


@dataclass
class Machine:
    """A folder of stubs in front of PATH, and the log of how they were called."""

    folder: Path

    def program(self, name: str, body: str) -> Path:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"{self.folder}/log"\n{body}\n')
        path.chmod(0o755)
        return path

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", **variables}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def install(self, what: str = "core", **variables: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHON": "python3", "VENV": str(self.folder / "env"), "TORCH": "torch==2.13.0", **variables}
        return self.run("sh", "scripts/install.sh", what, **settings)

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def without_ensurepip(self) -> None:
        self.program("python3", f'case "$*" in *ensurepip*) exit 1;; *) exec {sys.executable} "$@";; esac')

    def with_environment(self, torch: str | None, pip: bool = True) -> None:
        """An environment whose python says which torch it has; installing torch gives it 2.13.0."""
        scripts = self.folder / "env" / "bin"
        scripts.mkdir(parents=True)
        have = self.folder / "torch"
        if torch:
            have.write_text(torch)
        python = scripts / "python"
        python.write_text(
            STUB_PYTHON.format(log=self.folder / "log", torch=have, pip_missing=int(not pip)), encoding="utf-8"
        )
        python.chmod(0o755)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_venv_and_not_root_the_line_to_type_is_printed(machine: Machine) -> None:
    machine.without_ensurepip()
    machine.program("id", "echo 1000")
    machine.program("apt-get", "exit 0")
    machine.program("sudo", "exit 0")
    done = machine.install()
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    assert done.returncode == 1
    assert f"    sudo sh -c 'apt-get update && apt-get install {package}'\n" in done.stderr
    assert not any(line.startswith(("apt-get", "sudo")) for line in machine.log())
    assert not (machine.folder / "env").exists()


def test_without_venv_and_root_it_is_installed(machine: Machine) -> None:
    machine.without_ensurepip()
    machine.program("id", "echo 0")
    machine.program("apt-get", 'case "$1" in install) echo "E: no such package"; exit 100;; esac')
    done = machine.install()
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    calls = [line for line in machine.log() if line.startswith("apt-get")]
    assert calls == ["apt-get update", f"apt-get install -y --no-install-recommends {package}"]
    assert done.returncode == 1
    assert "E: no such package" in done.stderr, "apt-get's own words explain a failure"


def test_an_old_python_is_refused(machine: Machine) -> None:
    machine.program("python3", "echo 3.9")
    done = machine.install()
    assert done.returncode == 1
    assert "Python 3.9 is too old" in done.stderr
    assert not (machine.folder / "env").exists()


def test_no_python_is_said(machine: Machine) -> None:
    done = machine.install(PYTHON="python-that-is-not-there")
    assert done.returncode == 1
    assert "no 'python-that-is-not-there' here" in done.stderr


def test_a_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    mine = machine.folder / "env" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    done = machine.install()
    assert done.returncode == 1
    assert "is no Python environment" in done.stderr
    assert mine.read_text() == "mine"


def test_an_environment_without_pip_gets_it_and_is_kept(machine: Machine) -> None:
    machine.with_environment(torch="2.99.0+rocm", pip=False)
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert "env -m ensurepip" in machine.log()
    assert "constraint torch==2.99.0+rocm" in machine.log()


def bare_path(machine: Machine) -> str:
    """The stubs and what the script itself needs, so that no compiler of this machine is found."""
    tools = machine.folder / "tools"
    tools.mkdir()
    for name in ("sh", "cat", "mktemp", "rm", "sed", "touch", "chromium", "slurmctld"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/true")
    return f"{machine.folder}:{tools}"


@pytest.mark.parametrize(("user", "installs"), [("0", True), ("1000", False)])
def test_a_compiler_is_brought_for_the_kernels_or_said_to_be_missing(
    machine: Machine, user: str, installs: bool
) -> None:
    machine.with_environment(torch="2.99.0")
    machine.program("id", f"echo {user}")
    machine.program("apt-get", "exit 0")
    done = machine.install("dev", PATH=bare_path(machine), PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    asked = "apt-get install -y --no-install-recommends gcc libc6-dev" in machine.log()
    assert asked == installs
    assert ("no C compiler here" in done.stderr) != installs


@pytest.mark.parametrize("what", ["core", "dev"])
def test_an_installed_torch_is_kept(machine: Machine, what: str) -> None:
    machine.with_environment(torch="2.99.0+rocm")
    done = machine.install(what)
    assert done.returncode == 0, done.stderr
    installs = [line for line in machine.log() if " install " in line]
    assert len(installs) == (1 if what == "core" else 2)
    assert "torch" not in installs[0].split("--constraint")[0]
    assert all(" --no-deps " in line for line in installs[1:])  # nothing that could bring another torch
    assert "constraint torch==2.99.0+rocm" in machine.log()
    assert (machine.folder / "env" / ".fireflyer-core").exists()
    assert (machine.folder / "env" / ".fireflyer-dev").exists() == (what == "dev")


def test_torch_comes_first_where_there_is_none(machine: Machine) -> None:
    machine.with_environment(torch=None)
    done = machine.install()
    assert done.returncode == 0, done.stderr
    installs = [line for line in machine.log() if " install " in line]
    assert installs[0].endswith("install -qq torch==2.13.0")
    assert installs[1].endswith("--editable .")
    assert "constraint torch==2.13.0" in machine.log()


@pytest.mark.parametrize("code", [0, 3])
def test_ci_passes_the_exit_code_on(machine: Machine, code: int) -> None:
    machine.program("make", f"exit {code}")
    assert machine.run("bash", ".ci/run").returncode == code
    assert machine.log() == ["make test"]
