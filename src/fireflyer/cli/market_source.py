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
        help=f"{ASHARES} (default: real A-shares 2020-2024 out of a package) or {MADE_UP} (a made-up market)",
    )


def open_source(source: str) -> Panel:
    """The panel meant. Raises UserError."""
    if source == ASHARES:
        from fireflyer.market.data.ashares import read_ashares

        return read_ashares()
    if source == MADE_UP:
        from fireflyer.market.synthetic import synthetic_panel

        return synthetic_panel(0, days=900, names=120)
    raise UserError(f"--data {source}: unknown; give {ASHARES} or {MADE_UP}")
