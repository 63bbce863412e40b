"""The desk from its command line: verbs are listed, wrong words end in one line, a missing package in what to type."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fireflyer.cli.main import main

MADE_UP = ["--data", "builtin:synthetic"]


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["market", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_verb_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = told(capsys, "--help")
    assert code == 0
    for verb in ("demo", "data", "train", "predict", "backtest", "audit", "report", "forecast", "trade"):
        assert f"\n    {verb} " in out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["audit", "--plant", "none", *MADE_UP], "no such leak; there are full-window-z-score"),
        (["audit", "--dates", "0", *MADE_UP], "--dates is 1 or more"),
        (["audit", "--cash", "0", "--run", "nowhere", *MADE_UP], "buys nothing"),
        (["audit", "--data", "builtin:shares"], "builtin:ashares and builtin:synthetic"),
        (["audit", "--data", "nothing.csv"], "nothing.csv: no such file"),
        (["audit", "--run", "nowhere", *MADE_UP], "nowhere: no trained market model"),
    ],
)
def test_wrong_words_end_in_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = told(capsys, *argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_a_missing_package_is_named_with_the_line_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "skfolio.model_selection", None)
    monkeypatch.chdir(tmp_path)
    code, _, err = told(capsys, "train", *MADE_UP)
    assert (code, err) == (2, "fireflyer: fireflyer market needs skfolio: pip install 'fireflyer[market]'\n")
    assert not list(tmp_path.iterdir())
