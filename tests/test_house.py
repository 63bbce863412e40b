"""The house rules that no linter knows: words that do not belong, what stays light, and pages that tell the truth."""

from __future__ import annotations

import ast
import doctest
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks._result import machine_path
from benchmarks._tables import document_paths, rewrite
from fireflyer.cli import main as cli

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "fireflyer"
MODULES = sorted(SOURCE.rglob("*.py"))
CONSOLE = re.compile(r"(<!-- exact -->\n)?```console\n(.*?)```", re.DOTALL)


@cache
def published_files() -> list[Path]:
    """Every text file that is or would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


def test_no_machine_paths() -> None:
    found = {}
    for path in published_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if place := machine_path(line):
                found[f"{path.relative_to(ROOT)}:{number}"] = place
    assert not found


def test_no_leftover_marks_or_registry_hosts() -> None:
    marks = re.compile(
        r"\b(?:TO[D]O|FIX[M]E|X[X]X)\b|\b(?:pypi|pythonhosted|npmjs|debian|download\.pytorch)[.](?:org|com)\b"
    )
    found = {}
    for path in published_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := marks.search(line):
                found[f"{path.relative_to(ROOT)}:{number}"] = match.group()
    assert not found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_module_prints_and_moves_nothing_by_itself(path: Path) -> None:
    """Only `cli` prints or reads argv; a device is where the caller put the tensors, never `.cuda()`."""
    in_cli = path.is_relative_to(SOURCE / "cli") or path.name == "__main__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert in_cli or called not in ("print", "sys.stdout.write", "sys.stderr.write"), f"{where}: {called}"
            assert not called.endswith(".cuda"), f"{where}: {called}() needs a device check: use .to(device)"
        if isinstance(node, ast.Attribute):
            assert in_cli or ast.unparse(node) != "sys.argv", f"{where}: sys.argv"
            assert "cuda.amp" not in ast.unparse(node), f"{where}: torch.amp takes the device's type"


def test_the_architecture_knows_no_parallelism() -> None:
    for path in (SOURCE / "model").glob("*.py"):
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path.name


def test_face_names_exist() -> None:
    import fireflyer

    assert sorted(fireflyer.__all__) == dir(fireflyer)
    for name in fireflyer.__all__:
        assert getattr(fireflyer, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fireflyer.no_such_name


@pytest.mark.parametrize(
    "program",
    [
        "import fireflyer",
        "import fireflyer.config, fireflyer.errors",
        "import pkgutil, importlib, fireflyer.cost as p\n"
        "for m in pkgutil.iter_modules(p.__path__): importlib.import_module('fireflyer.cost.' + m.name)",
        "import pkgutil, importlib, fireflyer.text as p\n"
        "for m in pkgutil.iter_modules(p.__path__): importlib.import_module('fireflyer.text.' + m.name)",
        "from fireflyer.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from fireflyer.cli.main import main\ntry: main(['pretrain', '--help'])\nexcept SystemExit: pass",
        "from fireflyer.cli.main import main\ntry: main(['serve', '--help'])\nexcept SystemExit: pass",
        "from fireflyer.cli.main import main\ntry: main(['fleet', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_loads_no_torch(program: str) -> None:
    check = "\nimport sys\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", program + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_is_asked_for_once_and_by_a_floor() -> None:
    """An upper bound or an exact version, here or in an extra, would make pip replace the torch that a user has."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = re.findall(r'^ +"(torch[^"]*)"', text, re.MULTILINE)
    assert len(asked) == 1
    assert re.fullmatch(r"torch>=[\d.]+", asked[0])


def console_commands() -> list[tuple[str, str]]:
    """(page, command) for each `$ ` line of the pages' console blocks."""
    commands = []
    for path in document_paths():
        for _, block in CONSOLE.findall(path.read_text(encoding="utf-8")):
            joined = block.replace("\\\n", " ")
            commands += [(path.name, line[2:]) for line in joined.splitlines() if line.startswith("$ ")]
    return commands


@pytest.mark.parametrize(("page", "command"), console_commands())
def test_page_command_parses(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command of the pages is one that exists, options and all; none is run here."""
    words = shlex.split(command, comments=True)
    program = words[0].rsplit("/", 1)[-1]
    if program == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    elif program == "fireflyer":
        for verb in cli.VERBS.values():
            monkeypatch.setattr(verb, "run", lambda arguments: 0)
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
    else:
        assert program in ("git", "cd", "pip", "torchrun", "curl"), f"{page}: the test knows no '{program}'"


def exact_blocks() -> list[tuple[str, str]]:
    """(page, block) for each console block that promises its exact output."""
    return [
        (path.name, block)
        for path in document_paths()
        for exact, block in CONSOLE.findall(path.read_text(encoding="utf-8"))
        if exact
    ]


@pytest.mark.parametrize(("page", "block"), exact_blocks())
def test_page_output_is_true(page: str, block: str, tmp_path: Path) -> None:
    command, expected = block.removeprefix("$ ").split("\n", 1)
    words = shlex.split(command)
    assert words[0].rsplit("/", 1)[-1] == "fireflyer", f"{page}: only fireflyer's output can be exact"
    done = subprocess.run(
        [sys.executable, "-m", "fireflyer", *words[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == expected.strip(), done.stderr


@pytest.mark.parametrize("path", document_paths(), ids=lambda path: path.name)
def test_page_examples_are_true(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pycon blocks of a page, run in order as one session."""
    monkeypatch.chdir(tmp_path)
    session = "\n".join(re.findall(r"```pycon\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))
    test = doctest.DocTestParser().get_doctest(session, {}, path.name, path.name, 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("path", document_paths(), ids=lambda path: path.name)
def test_page_is_up_to_date_with_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert rewrite(text, chinese=path.name.endswith(".zh-CN.md"), source=path.name) == text, "run `make tables`"


@pytest.mark.parametrize("path", document_paths(), ids=lambda path: path.name)
def test_page_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{path.name}: {link}"


def test_results_hold_no_machine_path() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["part"] == path.stem
        assert (ROOT / "benchmarks" / path.with_suffix(".py").name.replace("-", "_")).exists()
        assert machine_path(path.read_text(encoding="utf-8")) is None
