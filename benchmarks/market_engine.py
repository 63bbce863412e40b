"""The daily backtest's speed: ten years, 5,000 names, the fifty best held and five changed a day, after the scores.

    make proof PART=market-engine
    FIREFLYER_QLIB_PYTHON=~/qlib/bin/python make proof PART=market-engine     # beside qlib, in its own environment

The market is made up (A-share boards, suspensions, splits, listings that come and go), and so are the scores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._result import ROOT, Proof, Table
from fireflyer.market.engine import BacktestSettings, backtest
from fireflyer.market.panel import Floats, Panel
from fireflyer.market.synthetic import synthetic_panel

SESSIONS, NAMES = 2430, 5000
PEER_SESSIONS = 486
"""Two years, which qlib is given: its sessions cost the same in the second as in the tenth."""
REPEATS = 3
LONGEST_S = 10.0
TIMES_QLIB = 5.0
QLIB = "FIREFLYER_QLIB_PYTHON"


def main() -> Proof:
    """Ours, then qlib's where its Python is named."""
    panel = synthetic_panel(0, days=SESSIONS, names=NAMES)
    scores = slow_scores(panel)
    seconds, result = [], None
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = backtest(panel, scores, BacktestSettings())
        seconds.append(time.perf_counter() - began)
    assert result is not None
    figures: dict[str, Any] = {
        "sessions": SESSIONS,
        "names": NAMES,
        "seconds": min(seconds),
        "sessions_per_s": SESSIONS / min(seconds),
        "fills": len(result.fills),
        "rejections": len(result.rejections),
        "order_hash": result.order_hash,
    }
    rows: list[list[str | int | float]] = [
        ["Fireflyer", SESSIONS, round(min(seconds), 1), round(SESSIONS / min(seconds))]
    ]
    missed = []
    if min(seconds) > LONGEST_S:
        missed.append(f"a backtest takes {min(seconds):.1f} s; {LONGEST_S:g} s were wanted")
    first = SESSIONS - min(PEER_SESSIONS, SESSIONS)
    peer = qlib_seconds(panel.slice(first, SESSIONS), scores[first:])
    figures["qlib"] = peer
    if peer is None:
        print(f"without qlib: {QLIB} names no Python that has it", file=sys.stderr)
    else:
        rate = peer["sessions"] / peer["seconds"]
        figures["times_qlib"] = times = SESSIONS / min(seconds) / rate
        rows.append([f"qlib {peer['version']}", peer["sessions"], round(peer["seconds"], 1), round(rate)])
        if times < TIMES_QLIB:
            missed.append(f"{times:.1f} times as fast as qlib; {TIMES_QLIB:g} were wanted")
    table = Table(["", "sessions", "seconds", "sessions a second"], rows)
    return Proof(figures, {"speed": table}, missed=missed)


def slow_scores(panel: Panel) -> Floats:
    """Random ones that change over some weeks, as signals do; members alone have one."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=panel.shape)
    for row in range(1, len(scores)):
        scores[row] = 0.95 * scores[row - 1] + 0.3 * scores[row]
    return np.where(panel.member, scores, np.nan)


def qlib_seconds(panel: Panel, scores: Floats) -> dict[str, Any] | None:
    """None where no Python with qlib is named."""
    python = os.environ.get(QLIB)
    if not python:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), panel)
        given = Path(folder) / "scores.npz"
        codes = [code_of(symbol).upper() for symbol in panel.symbols]
        np.savez(given, dates=panel.dates, names=codes, scores=scores)
        command = [python, str(ROOT / "benchmarks" / "_qlib.py"), folder, str(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"qlib's backtest failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def code_of(symbol: str) -> str:
    """ "600000.XSHG" is "sh600000" in qlib."""
    return ("sh" if symbol.endswith("XSHG") else "sz") + symbol[:6]


def write_store(folder: Path, panel: Panel) -> None:
    """qlib's binary store: adjusted prices, the factor beside them; each field float32 from its first day on."""
    (folder / "calendars").mkdir()
    (folder / "instruments").mkdir()
    days = [str(date) for date in panel.dates]
    (folder / "calendars" / "day.txt").write_text("\n".join(days) + "\n")
    lines = []
    for column, symbol in enumerate(panel.symbols):
        rows = np.flatnonzero(panel.traded[:, column])
        if not len(rows):
            continue
        start, stop = int(rows[0]), int(rows[-1]) + 1
        lines.append(f"{code_of(symbol).upper()}\t{days[start]}\t{days[stop - 1]}\n")
        features = folder / "features" / code_of(symbol)
        features.mkdir(parents=True)
        adjusted = panel.adjusted_close[start:stop, column]
        before = np.concatenate([[np.nan], adjusted[:-1]])
        factor = panel.factor[start:stop, column]
        fields = {"close": adjusted, "factor": factor, "change": adjusted / before - 1}
        if panel.volume is not None:
            fields["volume"] = panel.volume[start:stop, column] / factor
        for name, values in fields.items():
            np.concatenate([[start], values]).astype("<f4").tofile(features / f"{name}.day.bin")
    (folder / "instruments" / "all.txt").write_text("".join(lines))
