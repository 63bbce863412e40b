"""`fireflyer report RUN [RUN]`: what a run was, as one HTML file; two runs beside one another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.report.run_data import RunData

_FILE = "report.html"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "report",
        help="a run's curves, experts, samples and cost as one HTML file",
        description="Write what a run was, finished or still training, as one HTML file that needs nothing else:"
        " curves, load of the experts, samples, model and recipe. Two runs are drawn into the same charts.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or two to compare")
    parser.add_argument("--out", metavar="FILE", help=f"the HTML file (default RUN/{_FILE}; for two runs A-and-B.html)")
    parser.add_argument("--png", metavar="DIR", help="also draw each chart as a PNG into this folder")
    parser.add_argument("--usd-per-hour", type=_price, metavar="X", help="what the machine costs, for the bill")


def run(args: argparse.Namespace) -> int:
    """Do it; prints what was written."""
    from fireflyer.checkpoint.run import write_text
    from fireflyer.checkpoint.run_folder import writing
    from fireflyer.report.page import report_page
    from fireflyer.report.run_data import read_run

    if len(args.runs) > 2:
        raise UserError(f"{len(args.runs)} runs were given; a report shows one, or two beside one another")
    runs = [read_run(folder) for folder in args.runs]
    if len(runs) == 2 and runs[0].folder.resolve() == runs[1].folder.resolve():
        raise UserError(f"{args.runs[0]} was given twice; give another run to compare it with")
    page = Path(args.out) if args.out else _default_file(runs)
    with writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, report_page(runs, usd_per_hour=args.usd_per_hour))
    print(page)
    if args.png:
        from fireflyer.report.png import write_pngs

        for path in write_pngs(runs, Path(args.png)):
            print(path)
    return 0


def _default_file(runs: list[RunData]) -> Path:
    if len(runs) == 1:
        return runs[0].folder / _FILE
    return Path(f"{runs[0].name}-and-{runs[1].name}.html")


def _price(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value
