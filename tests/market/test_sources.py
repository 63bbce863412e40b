"""Bars from files and vendors' frames: the same panel whatever the form, and every mistake with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.data.adapters import canonical, from_frame
from fireflyer.market.data.files import membership_of, read_panel
from fireflyer.market.data.long_table import Membership, to_panel
from fireflyer.market.panel import Panel
from fireflyer.market.synthetic import synthetic_panel

HEADER = "date,symbol,open,high,low,close,volume"
ROWS = [
    "2024-01-02,600000.XSHG,10.00,10.20,9.90,10.10,1000",
    "2024-01-02,000001.XSHE,20.00,20.20,19.90,20.10,2000",
    "2024-01-03,600000.XSHG,10.10,10.40,10.00,10.30,1500",
    "2024-01-04,600000.XSHG,10.30,10.30,10.10,10.20,1200",
    "2024-01-04,000001.XSHE,20.00,20.60,19.90,20.50,2500",
]


def write(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_csv_with_a_day_that_one_name_missed(tmp_path: Path) -> None:
    panel = read_panel(write(tmp_path / "bars.csv", ROWS))
    assert panel.symbols == ("000001.XSHE", "600000.XSHG")
    assert [str(date) for date in panel.dates] == ["2024-01-02", "2024-01-03", "2024-01-04"]
    assert panel.traded.tolist() == [[True, True], [False, True], [True, True]]
    assert np.isnan(panel.close[1, 0])  # no fill, forward or back
    assert panel.returns()[2, 0] == pytest.approx(20.50 / 20.10 - 1)
    assert not panel.origin.close_only
    assert len(panel.origin.sha256) == 64
    assert panel.index_close[2] / panel.index_close[1] - 1 == pytest.approx((20.5 / 20.1 + 10.2 / 10.3 - 2) / 2)


def test_the_newest_first_is_an_order_too(tmp_path: Path) -> None:
    forward, back = read_panel(write(tmp_path / "a.csv", ROWS)), read_panel(write(tmp_path / "b.csv", ROWS[::-1]))
    np.testing.assert_array_equal(forward.close, back.close)


def third(old: str, new: str) -> Callable[[list[str]], list[str]]:
    """The third row changed."""
    return lambda rows: [*rows[:2], rows[2].replace(old, new), *rows[3:]]


THIRD = "line 4: 2024-01-03 600000.XSHG"
LATE = "2030-01-02,600000.XSHG,1,1,1,1,1"
MISTAKES = [
    (lambda rows: [*rows, rows[2]], "line 7: 2024-01-03 600000.XSHG: a second bar of that name and day"),
    (lambda rows: [rows[2], rows[0], *rows[3:]], "line 3: 2024-01-02 600000.XSHG: comes after a later day"),
    (third("10.40", "9.00"), f"{THIRD}: the high lies below the low"),
    (third("10.30", "-1"), f"{THIRD}: close isn't above 0"),
    (third("10.10,", "11.00,"), f"{THIRD}: the open lies outside"),
    (third("1500", "many"), f"{THIRD}: volume is 'many', no number"),
    (third("2024-01-03", "2024-01-03T15:00:00+08:00"), "a time with a zone"),
    (third("2024-01-03", "Jan 3"), "'Jan 3' is no date"),
    (lambda rows: [*rows, LATE], "line 7: 2030-01-02 600000.XSHG: lies in the future; today is 2024-06-28"),
    (third("1500", "0"), "2024-01-03: no name traded"),
    (third("10.10", ""), f"{THIRD}: a close but no open"),
    (third("1500", "1500,7"), "line 4: 8 cells, the header has 7"),
    (lambda rows: [], "no rows"),
]


@pytest.mark.parametrize(("change", "words"), MISTAKES)
def test_every_mistake_has_its_place(tmp_path: Path, change: Callable[[list[str]], list[str]], words: str) -> None:
    path = write(tmp_path / "bars.csv", change(list(ROWS)))
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        read_panel(path, today=np.datetime64("2024-06-28"))
    assert str(caught.value).startswith(str(path))


def test_a_universe_that_shrinks_or_is_empty_is_no_universe(tmp_path: Path) -> None:
    rows = [f"2024-01-{day:02d},60000{name}.XSHG,1,1,1,1,1" for day in (2, 3) for name in range(6)]
    path = write(tmp_path / "bars.csv", [*rows, "2024-01-04,600000.XSHG,1,1,1,1,1"])
    with pytest.raises(UserError, match="2024-01-04: the universe shrinks from 6 names to 1"):
        read_panel(path)
    spells = Membership("list", [("600000.XSHG", np.datetime64("2023-01-01"), np.datetime64("2024-01-03"))])
    with pytest.raises(UserError, match="2024-01-03: the universe is empty"):
        read_panel(write(tmp_path / "b.csv", rows), membership=spells)


def test_members_come_and_go_with_their_spells(tmp_path: Path) -> None:
    path = write(tmp_path / "bars.csv", ROWS)
    day = np.datetime64
    spells = [("600000.XSHG", day("2020-01-01"), None), ("000001.XSHE", day("2020-01-01"), day("2024-01-04"))]
    panel = read_panel(path, universe="point-in-time", membership=Membership("list", spells))
    assert panel.member.tolist() == [[True, True], [True, True], [False, True]]
    twice = Membership("list", [*spells, ("600000.XSHG", day("2021-01-01"), None)])
    with pytest.raises(UserError, match=r"list: 600000\.XSHG: two spells overlap at 2021-01-01"):
        read_panel(path, membership=twice)
    more = Membership("list", [*spells, ("600009.XSHG", day("2020-01-01"), None)])
    with pytest.raises(UserError, match=r"1 of 3 members of list have no bars, 600009\.XSHG first"):
        read_panel(path, membership=more)
    gone = Membership("list", [*spells, ("600009.XSHG", day("2010-01-01"), day("2015-01-01"))])
    assert read_panel(path, membership=gone).member.sum() == 5


def frames() -> dict[str, Any]:
    """The same two days of 600000 and, where a form has several names, of 000001, as each library gives them."""
    pandas = pytest.importorskip("pandas")
    return {
        "akshare": pandas.DataFrame(
            {"日期": ["2024-01-02", "2024-01-03"], "股票代码": ["600000"] * 2, "开盘": [10.0, 10.1],
             "收盘": [10.1, 10.3], "最高": [10.2, 10.4], "最低": [9.9, 10.0], "成交量": [10, 15],
             "成交额": [10100.0, 15300.0], "振幅": [3.0, 4.0],
             "涨跌幅": [1.0, 1.98], "涨跌额": [0.1, 0.2], "换手率": [0.1, 0.2]}
        ),
        "baostock": pandas.DataFrame(
            {"date": ["2024-01-02", "2024-01-03"], "code": ["sh.600000"] * 2, "open": ["10.0000", "10.1000"],
             "high": ["10.2000", "10.4000"], "low": ["9.9000", "10.0000"], "close": ["10.1000", "10.3000"],
             "volume": ["1000", "1500"], "amount": ["10100.0000", "15300.0000"], "tradestatus": ["1", "1"]}
        ),
        "tushare": pandas.DataFrame(
            {"ts_code": ["600000.SH"] * 2, "trade_date": ["20240103", "20240102"], "open": [10.1, 10.0],
             "high": [10.4, 10.2], "low": [10.0, 9.9], "close": [10.3, 10.1], "pre_close": [10.1, 10.0],
             "vol": [15.0, 10.0], "amount": [15.3, 10.1]}
        ),
        "yfinance": pandas.DataFrame(
            {"Open": [10.0, 10.1], "High": [10.2, 10.4], "Low": [9.9, 10.0], "Close": [10.1, 10.3],
             "Adj Close": [5.05, 5.15], "Volume": [1000, 1500]},
            index=pandas.DatetimeIndex(["2024-01-02", "2024-01-03"], name="Date"),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("vendor", ["akshare", "baostock", "tushare", "yfinance"])
def test_vendors_frames_become_the_same_panel(vendor: str) -> None:
    panel = to_panel(from_frame(frames()[vendor], vendor, symbol="600000.SS" if vendor == "yfinance" else None))
    assert panel.symbols == ("600000.XSHG",)
    assert [str(date) for date in panel.dates] == ["2024-01-02", "2024-01-03"]
    for name, expected in (
        ("open", [10.0, 10.1]),
        ("high", [10.2, 10.4]),
        ("low", [9.9, 10.0]),
        ("close", [10.1, 10.3]),
    ):
        np.testing.assert_allclose(getattr(panel, name)[:, 0], expected)
    assert panel.volume is not None
    np.testing.assert_allclose(panel.volume[:, 0], [1000, 1500])
    if vendor != "yfinance":
        assert panel.amount is not None
        np.testing.assert_allclose(panel.amount[:, 0], [10100, 15300])
    np.testing.assert_allclose(panel.factor[:, 0], 0.5 if vendor == "yfinance" else 1.0)


def test_vendors_suspensions_and_zones() -> None:
    pandas = pytest.importorskip("pandas")
    baostock = frames()["baostock"]
    baostock.loc[2] = ["2024-01-04", "sh.600000", "10.3", "10.3", "10.3", "10.3", "", "", "0"]
    baostock.loc[3] = ["2024-01-04", "sz.000001", "20.3", "20.3", "20.3", "20.3", "100", "2030", "1"]
    panel = to_panel(from_frame(baostock, "baostock"))
    assert panel.traded[2].tolist() == [True, False]
    assert np.isnan(panel.close[2, 1])  # the padded price of a suspended day is no bar
    zoned = frames()["yfinance"]
    zoned.index = pandas.DatetimeIndex(zoned.index.tz_localize("America/New_York"), name="Date")
    with pytest.raises(UserError, match="a time with a zone"):
        to_panel(from_frame(zoned, "yfinance", symbol="MSFT"))
    with pytest.raises(UserError, match="say whose it is"):
        from_frame(frames()["yfinance"], "yfinance")
    with pytest.raises(UserError, match="its columns are a, b"):
        from_frame(pandas.DataFrame({"a": [1], "b": [2]}), "frame")
    with pytest.raises(UserError, match="no column 'close'"):
        from_frame(pandas.DataFrame({"date": ["2024-01-02"], "symbol": ["x"]}), "frame")


def test_codes_of_every_spelling() -> None:
    for code in ("sh.600000", "SH600000", "600000.SH", "600000.SS", "600000", "600000.XSHG"):
        assert canonical(code) == "600000.XSHG"
    for code in ("sz.000001", "SZ000001", "000001.SZ", "000001", "300750.SZ"):
        assert canonical(code).endswith(".XSHE")
    assert canonical("MSFT") == "MSFT"


def test_closes_side_by_side(tmp_path: Path) -> None:
    wide = ["2024-01-02,10.10,20.10", "2024-01-03,10.30,", "2024-01-04,10.20,20.50"]
    panel = read_panel(write(tmp_path / "wide.csv", wide, "date,600000.SH,000001.XSHE"))
    long = read_panel(write(tmp_path / "bars.csv", ROWS))
    assert panel.symbols == long.symbols
    np.testing.assert_array_equal(panel.close, long.close)
    assert panel.origin.close_only
    for row, line, words in (
        (1, "2024-01-03,x,", "line 3: 2024-01-03 600000.XSHG: close is 'x', no number"),
        (2, "2024-01-04,1,-2", "line 4: 2024-01-04 000001.XSHE: close isn't above 0"),
    ):
        broken = [*wide[:row], line, *wide[row + 1 :]]
        with pytest.raises(UserError, match=words):
            read_panel(write(tmp_path / "broken.csv", broken, "date,600000.SH,000001.XSHE"))
    with pytest.raises(UserError, match=r"line 5: 2024-01-04 000001\.XSHE: a second bar .* line 4; keep one"):
        read_panel(write(tmp_path / "twice.csv", [*wide, "2024-01-04,,20.5"], "date,600000.SH,000001.XSHE"))


def test_parquet_and_a_file_a_name(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    whole = read_panel(write(tmp_path / "bars.csv", ROWS))
    names = HEADER.split(",")
    cells = [row.split(",") for row in ROWS]
    columns = {name: [c[i] if i < 2 else float(c[i]) for c in cells] for i, name in enumerate(names)}
    parquet.write_table(pyarrow.table(columns), tmp_path / "bars.parquet")
    same(read_panel(tmp_path / "bars.parquet"), whole)
    folder = tmp_path / "apart"
    folder.mkdir()
    for symbol in whole.symbols:
        write(folder / f"{symbol}.csv", [row for row in ROWS if symbol in row])
    same(read_panel(folder), whole)
    with pytest.raises(UserError, match="no such file or folder"):
        read_panel(tmp_path / "none.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.csv or \.parquet file in it"):
        read_panel(tmp_path / "empty")


def same(found: Panel, expected: Panel) -> None:
    assert found.symbols == expected.symbols
    for name in ("dates", "close", "open", "high", "low", "volume", "traded", "member"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_qlibs_store(tmp_path: Path) -> None:
    """Written as qlib's dump does: adjusted prices, the factor beside them, each field from its first day on."""
    panel = synthetic_panel(2, days=60, names=5)
    (tmp_path / "calendars").mkdir()
    (tmp_path / "calendars" / "day.txt").write_text("\n".join(map(str, panel.dates)) + "\n")
    for column, symbol in enumerate(panel.symbols):
        code = ("sh" if symbol.endswith("XSHG") else "sz") + symbol[:6]
        folder = tmp_path / "features" / code
        folder.mkdir(parents=True)
        rows = np.flatnonzero(panel.traded[:, column])
        start, stop = rows[0], rows[-1] + 1
        factor = panel.factor[start:stop, column]
        for name in ("open", "high", "low", "close", "volume"):
            values = getattr(panel, name)[start:stop, column]
            values = values / factor if name == "volume" else values * factor
            np.concatenate([[start], values]).astype("<f4").tofile(folder / f"{name}.day.bin")
        np.concatenate([[start], factor]).astype("<f4").tofile(folder / "factor.day.bin")
    found = read_panel(tmp_path)
    assert set(found.symbols) == set(panel.symbols)
    picked = found.select(panel.symbols)
    np.testing.assert_array_equal(picked.traded, panel.traded)
    np.testing.assert_allclose(picked.close, panel.close)
    np.testing.assert_allclose(picked.returns(), panel.returns(), atol=1e-6)
    first = min((tmp_path / "features").iterdir())
    (first / "open.day.bin").write_bytes(np.array([9999, 1, 2], "<f4").tobytes())
    with pytest.raises(UserError, match=r"open\.day\.bin: doesn't fit the calendar of 60 days"):
        read_panel(tmp_path)


def test_point_in_time_universes() -> None:
    pytest.importorskip("index_constitution")
    spells = membership_of("csi300").spells
    day = np.datetime64("2022-07-01")
    inside = {symbol for symbol, start, stop in spells if start <= day and (stop is None or day < stop)}
    assert 298 <= len(inside) <= 302
    assert "600519.XSHG" in inside
    with pytest.raises(UserError, match="no universe 'csi9'"):
        membership_of("csi9")
