"""market train, predict and forecast from the command line's words to what they print and write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from fireflyer.cli import market_forecast, market_predict, market_source, market_train
from fireflyer.errors import UserError
from fireflyer.market.scores import read_scores
from fireflyer.market.study import Study
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(9, days=200, names=16, bars=False)
VERBS = {"train": market_train, "predict": market_predict, "forecast": market_forecast}
SMALL = ["steps=2", "batch_size=8", "seq_len=40", "threads=1", "schedule.warmup_steps=1", "model.n_routed_experts=4"]
FOLDS = ["market.train_months=5", "market.test_months=3"]


@pytest.fixture(autouse=True)
def panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(market_source, "open_source", lambda source: PANEL)


def market(*words: str) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="verb")
    for verb in VERBS.values():
        verb.add_parser(subparsers)
    arguments = parser.parse_args(list(map(str, words)))
    return VERBS[arguments.verb].run(arguments)


def settings(*more: str) -> list[str]:
    return [word for change in (*SMALL, *FOLDS, *more) for word in ("--set", change)]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(market_source, "open_source", lambda source: PANEL)
        assert market("train", "--run", str(folder / "bars"), *settings()) == 0
        assert market("train", "--run", str(folder / "tokens"), *settings("market.front_end=tokens")) == 0
    return folder


def last_name() -> str:
    return PANEL.symbols[int(np.flatnonzero(PANEL.traded[-30:].all(0))[0])]


def test_train_says_what_it_did_and_what_comes_next(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert market("train", "--run", str(study / "bars"), *settings()) == 0
    said = capsys.readouterr().out
    assert "trained already" in said
    assert f"fireflyer market predict --run {study / 'bars'}" in said
    assert market("train", "--run", str(study / "bars"), "--json", *settings()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["folds"]) == len(Study.load(study / "bars").models)
    assert facts["folds"][0]["learned"]["labels_end"] < facts["folds"][0]["from"]


def test_predict_writes_every_score(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert market("predict", "--run", str(study / "bars"), "--out", str(tmp_path / "scores.csv"), "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    scores = Study.load(study / "bars").scores(PANEL)
    assert read_scores(tmp_path / "scores.csv", PANEL).tobytes() == scores.tobytes()
    assert facts["scores"] == np.isfinite(scores).sum()
    assert facts["top"][0]["symbol"] == PANEL.symbols[int(np.nanargmax(scores[-1]))]


def test_forecast_shows_a_fan_and_paths(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["forecast", last_name(), "--run", str(study / "bars"), "--scenarios", str(study / "tokens")]
    assert market(*words, "--paths", "40", "--days", "6", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["quantiles"]) == ["1", "5", "20"]
    assert sorted(facts["quantiles"]["5"].values()) == list(facts["quantiles"]["5"].values())
    assert facts["risk"]["expected_shortfall"] >= facts["risk"]["value_at_risk"]
    assert market(*words, "--paths", "40", "--days", "6") == 0
    assert "value at risk 95%" in capsys.readouterr().out


def test_forecast_counts_how_true_it_was(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert market("forecast", "--calibration", "--run", str(study / "bars"), "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["coverage"]
    assert {row["horizon"] for row in found} == {1, 5, 20}
    assert all(0 <= row["share"] <= 1 for row in found)
    assert market("forecast", "--calibration", "--run", str(study / "bars")) == 0
    assert "Kupiec" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["forecast"], "give a SYMBOL, or --calibration"),
        (["forecast", "600000.XSHG", "--level", "1.5"], "--level lies between"),
        (["forecast", "600000.XSHG", "--date", "soon"], "not a date"),
        (["forecast", "600000.XSHG", "--date", "2021-01-09"], "no session"),
        (["train", "--set", "market.horizon=5"], "did you mean horizons"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        market(*words, "--run", str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
