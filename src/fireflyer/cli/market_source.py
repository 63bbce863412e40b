"""`--data` of the market's verbs: what bars are read from."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.market.panel import Panel

ASHARES = "builtin:ashares"
MADE_UP = "builtin:synthetic"


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        default=ASHARES,
        help=f"bars: {ASHARES} (default: real A-shares 2020-2024 out of a package), {MADE_UP} (a made-up market), a"
        " .csv or .parquet file, a folder of them, or a qlib store; PATH@csi500 takes that index's members of each day",
    )


def open_source(source: str) -> Panel:
    """The panel meant. Raises UserError."""
    if source == ASHARES:
        from fireflyer.market.data.ashares import read_ashares

        return read_ashares()
    if source == MADE_UP:
        from fireflyer.market.synthetic import synthetic_panel

        return synthetic_panel(0, days=900, names=120)
    if source.startswith("builtin:"):
        raise UserError(f"--data {source}: unknown; the built-in ones are {ASHARES} and {MADE_UP}")
    from fireflyer.market.data.files import membership_of, read_panel

    path, at, index = source.rpartition("@")
    if not at:
        return read_panel(source)
    return read_panel(path, universe="point-in-time", membership=membership_of(index))
