"""market data, backtest and trade from the command line's words to what they print and write."""

from __future__ import annotations

import argparse
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from fireflyer.cli import market_backtest, market_data, market_trade
from fireflyer.errors import UserError
from fireflyer.market.data.files import read_panel
from fireflyer.market.data.writing import write_panel
from fireflyer.market.scores import write_scores
from fireflyer.market.synthetic import synthetic_panel

VERBS = {"data": market_data, "backtest": market_backtest, "trade": market_trade}


def market(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="verb")
    for verb in VERBS.values():
        verb.add_parser(subparsers)
    arguments = parser.parse_args(list(map(str, words)))
    return VERBS[arguments.verb].run(arguments)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_data_writes_what_it_read(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    panel = synthetic_panel(6, days=60, names=9)
    write_panel(tmp_path / "bars.csv", panel)
    out = tmp_path / f"again.{form}"
    assert market("data", "--data", tmp_path / "bars.csv", "--out", out, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bars"] == facts["written"] == panel.traded.sum()
    assert (facts["first"], facts["last"]) == (str(panel.dates[0]), str(panel.dates[-1]))
    assert facts["names_a_session"]["most"] <= 9
    again = read_panel(out).select(panel.symbols)
    for name in ("close", "open", "high", "low", "volume", "amount", "traded"):
        np.testing.assert_array_equal(getattr(again, name), getattr(panel, name))
    np.testing.assert_array_equal(again.returns(), panel.returns())
    with pytest.raises(UserError, match="is there already"):
        market("data", "--data", tmp_path / "bars.csv", "--out", out)


def test_data_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("exchange_calendars")
    days = ("2024-01-02", "2024-01-03", "2024-01-05")  # the exchange was open on the 4th
    rows = [f"{day},{name},10" for day in days for name in ("600000.XSHG", "600001.XSHG") if (day, name) !=
            ("2024-01-03", "600001.XSHG")]  # fmt: skip
    (tmp_path / "bars.csv").write_text("date,symbol,close\n" + "\n".join(rows) + "\n")
    assert market("data", "--data", tmp_path / "bars.csv") == 0
    said = capsys.readouterr().out
    assert "1 of Shanghai's sessions missing: 2024-01-04" in said
    assert "members a session 1 to 2" in said
    assert "5, close" in said


@pytest.fixture
def bars(tmp_path: Path) -> list[str]:
    """Options: bars of a made-up market, and scores for them."""
    panel = synthetic_panel(6, days=60, names=30, signal=0.2)
    adjusted = panel.adjusted_close
    scores = np.full(panel.shape, np.nan)
    scores[5:] = 1 - adjusted[5:] / adjusted[:-5]
    write_panel(tmp_path / "bars.csv", panel)
    write_scores(tmp_path / "scores.csv", panel, scores)
    return ["--data", str(tmp_path / "bars.csv"), "--scores", str(tmp_path / "scores.csv")]


@pytest.mark.parametrize("portfolio", ["top", "mean-risk"])
def test_on_paper_as_in_the_backtest(
    portfolio: str, bars: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--portfolio", portfolio, "--names", "20", "--json"]
    assert market("backtest", *bars, *how) == 0
    tested = json.loads(capsys.readouterr().out)
    assert tested["order_hash"]
    ledger = ["--paper", "--ledger", str(tmp_path / "ledger.sqlite")]
    assert market("trade", *ledger, *bars, *how) == 0
    traded = json.loads(capsys.readouterr().out)
    assert len(traded["booked"]) == 55
    with sqlite3.connect(tmp_path / "ledger.sqlite") as book:
        assert book.execute("select count(*) from orders").fetchone() == (tested["orders"],)
        (nav,) = book.execute("select nav from days order by date desc").fetchone()
    assert nav / 100 == tested["ended_with"]
    assert market("trade", *ledger, *bars, *how) == 0
    assert json.loads(capsys.readouterr().out)["booked"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--portfolio", "best"], "--portfolio best: unknown"),
        (["--every", "0"], r"portfolio\.every = 0"),
        (["--cash", "50"], "give more cash, or hold fewer names"),
        (["--commission-bp", "-1"], "a fee is 0 or more"),
    ],
)
def test_what_a_backtest_refuses(words: list[str], message: str, bars: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        market("backtest", *bars, *words)
