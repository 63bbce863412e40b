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
    """Add the option."""
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        default=ASHARES,
        help=f"{ASHARES} (default: real A-shares 2020-2024 out of a package), {MADE_UP} (a made-up market), or bars of"
        " your own: PATH of a CSV or Parquet file, a folder of them, or qlib's store; PATH:csi300 takes that index's"
        " members of each day",
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
        raise UserError(f"--data {source}: unknown; give {ASHARES}, {MADE_UP} or a path")
    import numpy as np

    from fireflyer.market.data.files import membership_of, read_panel

    path, _, universe = source.partition(":")
    membership = membership_of(universe) if universe else None
    kind = "point-in-time" if universe else "as recorded"
    return read_panel(path, universe=kind, membership=membership, today=np.datetime64("today", "D"))
