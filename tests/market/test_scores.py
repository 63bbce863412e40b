"""Scores there and back to the bit; what a file can have wrong is named by its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fireflyer.errors import UserError
from fireflyer.market.scores import read_scores, write_scores
from fireflyer.market.synthetic import synthetic_panel

PANEL = synthetic_panel(2, days=20, names=5, bars=False)


@pytest.mark.parametrize("name", ["scores.csv", "new/scores.parquet"])
def test_scores_survive_a_file(name: str, tmp_path: Path) -> None:
    scores = np.random.default_rng(0).normal(size=PANEL.shape)
    scores[3:5, 1] = np.nan
    assert write_scores(tmp_path / name, PANEL, scores) == np.isfinite(scores).sum()
    assert read_scores(tmp_path / name, PANEL).tobytes() == scores.tobytes()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("2031-01-01,{s},1", r"line 2: no session '2031-01-01'"),
        ("{d},999999.XSHG,1", r"line 2: no symbol '999999.XSHG'"),
        ("{d},{s},nan", r"line 2: {d} {s}: score 'nan' is no number"),
        ("{d},{s},1\n{d},{s},2", r"line 3: {d} {s} has a second score"),
        ("", "no score in it"),
    ],
)
def test_the_line_that_is_wrong_is_named(lines: str, message: str, tmp_path: Path) -> None:
    d, s = str(PANEL.dates[4]), PANEL.symbols[2]
    path = tmp_path / "scores.csv"
    path.write_text("date,symbol,score\n" + lines.format(d=d, s=s))
    with pytest.raises(UserError, match=message.format(d=d, s=s)):
        read_scores(path, PANEL)


def test_other_columns_and_no_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("day,name,value\n")
    with pytest.raises(UserError, match="its columns are day, name, value"):
        read_scores(tmp_path / "a.csv", PANEL)
    with pytest.raises(UserError, match="can't be read"):
        read_scores(tmp_path / "b.csv", PANEL)
