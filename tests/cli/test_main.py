"""The command as a whole: exit codes, one line on stderr, nothing heavy before a verb runs."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable

import pytest

from fireflyer import __version__
from fireflyer.cli import inspect
from fireflyer.cli import main as cli
from fireflyer.errors import Stopped, UserError


def run(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(argv)
    out, err = capfd.readouterr()
    return code, out, err


MISTAKES = {
    ("inspct", "moonlight"): "unknown verb 'inspct'; did you mean inspect?",
    ("zzz",): "unknown verb 'zzz'. Verbs: ",
    ("--verison",): "did you mean --version?",
    ("--json", "inspect"): "unknown verb '--json'",
    ("",): "unknown verb ''",
    ("inspect",): "required: CONFIG; see fireflyer inspect --help",
    ("inspect", "moonlight", "--jsn"): "unknown argument --jsn; did you mean --json?; see fireflyer inspect --help",
    ("inspect", "moonlight", "--js"): "unknown argument --js",
    ("inspect", "moonlight", "deepseek-v2"): "unknown argument deepseek-v2",
    ("inspect", "moonlight", "--json=1"): "ignored explicit argument",
    ("inspect", "moonlite"): "did you mean moonlight?",
}


@pytest.mark.parametrize("argv", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_and_code_2(argv: tuple[str, ...], capfd: pytest.CaptureFixture[str]):
    code, out, err = run(capfd, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("fireflyer: ")
    assert err.count("\n") == 1
    assert MISTAKES[argv] in err


def raising(error: BaseException) -> Callable[[Namespace], int]:
    def fails(args: Namespace) -> int:
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("notes.txt: empty\nfile"), 2, "fireflyer: notes.txt: empty file\n"),
        (Stopped("saved at step 60"), 75, "fireflyer: saved at step 60\n"),
        (Stopped(), 75, "fireflyer: stopped and saved; the same command goes on from there\n"),
        (KeyboardInterrupt(), 130, "fireflyer: interrupted\n"),
    ],
)
def test_how_a_verb_ends_is_the_exit_code(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(inspect, "run", raising(error))
    assert run(capfd, "inspect", "moonlight") == (code, "", said)


def test_our_bug_shows_its_traceback_and_code_1(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(inspect, "run", raising(ValueError("not the user's")))
    code, _, err = run(capfd, "inspect", "moonlight")
    assert code == 1
    assert "Traceback" in err
    assert "ValueError: not the user's" in err


def test_help_and_version(capfd: pytest.CaptureFixture[str]):
    assert run(capfd, "--version") == (0, f"fireflyer {__version__}\n", "")
    for argv in ((), ("--help",), ("-h",)):
        code, out, err = run(capfd, *argv)
        assert (code, err) == (0, "")
        assert "inspect" in out
    for verb in cli.VERBS:
        assert run(capfd, verb, "--help")[0] == 0


def test_help_comes_fast_and_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from fireflyer.cli.main import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'pydantic', 'numpy', 'transformers', 'tokenizers', 'rich', 'jinja2'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else code)\n"
    )
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.4


@pytest.mark.parametrize("length", [10, 1_000_000])
def test_a_reader_that_goes_away_ends_it_quietly(length: int):
    """Both where the writing fails and where only the last flush does."""
    program = (
        "import sys\n"
        "from fireflyer.cli import inspect, main\n"
        f"inspect.run = lambda args: print('x' * {length}) or 0\n"
        "sys.exit(main.main(['inspect', 'moonlight']))\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_program_returns_the_code_of_the_verb():
    done = subprocess.run(
        [sys.executable, "-m", "fireflyer", "inspect", "nowhere"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fireflyer: 'nowhere' is no file or folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_are_told_to_sleep_before_torch_loads(given: dict[str, str], expected: str | None):
    program = (
        "import os, sys\nfrom fireflyer.cli.main import main\nassert main(['--version']) == 0\n"
        "assert 'torch' not in sys.modules\nprint(repr(os.environ.get('GOMP_SPINCOUNT')))"
    )
    others = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**others, **given}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == [repr(expected)], done.stderr
