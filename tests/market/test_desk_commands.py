"""market data: what it says of bars, and that what it writes is what it read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from fireflyer.cli import market_data
from fireflyer.errors import UserError
from fireflyer.market.data.files import read_panel
from fireflyer.market.data.writing import write_panel
from fireflyer.market.synthetic import synthetic_panel

VERBS = {"data": market_data}


def market(*words: str) -> int:
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
