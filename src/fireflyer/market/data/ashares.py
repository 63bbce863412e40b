"""Real A-shares without a download: 884 names of the CSI 500, 2020-01-02 to 2024-06-28, out of a package's sample file.

jqfactor_analyzer (JoinQuant, MIT) ships the daily weights of all CSI 500 members and the index's return. Weights drift
with prices, so a name's return is w(t)/w(t-1) · (1 + the index's return) - 1. What the file can't tell is not made up:
a name's first day in the index, days on which it didn't move (suspended), the half-yearly days on which membership
changes and every weight is set anew, and values beyond any price limit have no bar. Dividends look like falls.
Names that left the index are there as long as they were in it. Prices begin at a nominal 10.00.
"""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fireflyer.errors import UserError
from fireflyer.market.panel import Floats, Origin, Panel

PACKAGE = "jqfactor_analyzer"
INSTALL = "pip install --no-deps jqfactor-analyzer==1.1.0"
SHA256 = "69f41547150a51d482d891e975cd3a99dbb8e77a9c5006747d208b3006a78997"
_FILE = "sample_data/index_weight_info.csv"
_NOMINAL = 10.0
_REBALANCED = 30
"""Names that come or go on a day on which all weights are set anew."""
_BEYOND = 0.205
"""No name of these boards moves more in a day: beyond it the weights were re-based, not the price."""


def find_ashares() -> Path:
    """Where the file lies; the package is not imported. Raises UserError with the line that gets it."""
    spec = find_spec(PACKAGE)
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / _FILE
    if path is None or not path.is_file():
        raise UserError(f"the A-share panel lies in a package that isn't here; get it with {INSTALL}")
    return path


def read_ashares(path: Path | None = None) -> Panel:
    """The panel. Raises UserError where the file is absent or another one."""
    path = path or find_ashares()
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        raise UserError(
            f"{path}: not the file known here, its SHA-256 begins with {digest[:12]}; get it with {INSTALL}"
        )
    header, *lines = raw.decode("ascii").splitlines()
    symbols = tuple(header.split(",")[1:-1])
    cells = [line.split(",") for line in lines]
    dates = np.array([row[0] for row in cells], "datetime64[D]")
    numbers = np.array([[float(cell) if cell else np.nan for cell in row[1:]] for row in cells])
    weights, index = numbers[:, :-1], np.nan_to_num(numbers[:, -1])
    member = np.isfinite(weights)
    returns = recovered_returns(weights, index)
    traded = np.isfinite(returns) & (returns != 0)
    first = member & (np.cumsum(member, axis=0) == 1)
    grown: Floats = np.exp(np.cumsum(np.log1p(np.where(traded, returns, 0.0)), axis=0))
    traded |= first  # a bar to measure the next day's return from
    return Panel(
        dates=dates,
        symbols=symbols,
        close=np.where(traded, _NOMINAL * grown, np.nan),
        factor=np.ones(weights.shape, np.float64),
        traded=traded,
        member=member,
        index_close=np.cumprod(1 + index, dtype=np.float64) * 1000,
        origin=Origin(
            "CSI 500 members' weights of jqfactor_analyzer 1.1.0",
            "as recorded",
            close_only=True,
            nominal_prices=True,
            sha256=digest,
        ),
    )


def recovered_returns(weights: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(D, N) simple returns from weights (D, N), NaN where a name isn't in, and the index's returns (D,); else NaN."""
    shares = weights / np.nansum(weights, axis=1, keepdims=True)
    returns = np.full(weights.shape, np.nan)
    returns[1:] = shares[1:] / shares[:-1] * (1 + index[1:, None]) - 1
    there = np.isfinite(weights)
    changed = (there[1:] != there[:-1]).sum(axis=1)
    returns[1:][changed > _REBALANCED] = np.nan
    with np.errstate(invalid="ignore"):
        returns[np.abs(returns) > _BEYOND] = np.nan
    return returns
