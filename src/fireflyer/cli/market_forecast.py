"""`fireflyer market forecast SYMBOL`: what a name's price may do, with odds; and how true such odds were."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fireflyer.cli.market_train import RUN
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.market.forecast import Fan
    from fireflyer.market.panel import Panel


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser = subparsers.add_parser(
        "forecast",
        help="a name's quantile fan, sampled paths and value at risk; how true they were",
        description="The odds of a name's return over the next sessions, as quantiles; with --scenarios also paths"
        " drawn token by token, and their value at risk. --calibration instead counts how often returns fell below"
        " each quantile on the sessions that the models had not learned from.",
    )
    parser.add_argument("symbol", metavar="SYMBOL", nargs="?", help="a name of the panel, as 600000.XSHG")
    add_source(parser)
    parser.add_argument("--run", metavar="DIR", default=RUN, help=f"a study of market train (default {RUN})")
    parser.add_argument("--date", metavar="DATE", help="the session to stand at the close of (default the last)")
    parser.add_argument("--scenarios", metavar="DIR", help="a study trained with --set market.front_end=tokens")
    parser.add_argument("--days", metavar="N", type=int, default=20, help="days of each path (default 20)")
    parser.add_argument("--paths", metavar="N", type=int, default=1000, help="paths drawn (default 1000)")
    parser.add_argument("--level", metavar="P", type=float, default=0.95, help="of the value at risk (default 0.95)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the paths (default 0)")
    parser.add_argument("--calibration", action="store_true", help="count how true the quantiles were")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.cli.market_source import open_source

    if args.calibration == (args.symbol is not None):
        raise UserError("give a SYMBOL, or --calibration for all of them")
    if not 0.5 <= args.level < 1 or args.paths < 1 or args.days < 1 or args.seed < 0:
        raise UserError("--level lies between 0.5 and 1, --paths and --days are 1 or more, --seed 0 or more")
    panel = open_source(args.data)
    if args.calibration:
        return _calibration(panel, args)
    row = len(panel.dates) - 1 if args.date is None else _row(panel, args.date)
    facts = _fan(panel, row, args)
    if args.scenarios is not None:
        facts |= _scenarios(panel, row, args)
    print(json.dumps(facts) if args.json else _described(facts, args.level))
    return 0


def _row(panel: Panel, date: str) -> int:
    import numpy as np

    try:
        row = panel.row(np.datetime64(date, "D"))
    except ValueError:
        raise UserError(f"--date {date}: not a date; write 2024-06-28") from None
    if row >= len(panel.dates) or str(panel.dates[row]) != date:
        raise UserError(f"--date {date}: no session of {panel.origin.source}, {panel.dates[0]} to {panel.dates[-1]}")
    return row


def _fan(panel: Panel, row: int, args: argparse.Namespace) -> dict[str, Any]:
    from fireflyer.market.forecast import fan
    from fireflyer.market.heads import QUANTILES
    from fireflyer.market.study import Study

    known = panel.slice(0, row + 1)
    forecast = Study.load(args.run).model_at(known).forecast(known, row)
    drawn: Fan = fan(forecast, known, row, args.symbol)
    quantiles = {
        str(horizon): {f"{level:g}": float(value) for level, value in zip(QUANTILES, values, strict=True)}
        for horizon, values in zip(drawn.horizons, drawn.returns, strict=True)
    }
    return {"symbol": drawn.symbol, "date": drawn.date, "quantiles": quantiles}


def _scenarios(panel: Panel, row: int, args: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from fireflyer.market.forecast import path_risk
    from fireflyer.market.study import Study
    from fireflyer.market.tokens import TokenNetwork, sample_scenarios

    known = panel.slice(0, row + 1)
    model = Study.load(args.scenarios).model_at(known)
    if not isinstance(model.network, TokenNetwork):
        raise UserError(f"--scenarios {args.scenarios}: reads bars; train one with --set market.front_end=tokens")
    drawn = sample_scenarios(
        model.network,
        known,
        row,
        symbols=(args.symbol,),
        days=args.days,
        num_paths=args.paths,
        seq_len=model.recipe.train.seq_len,
        seed=args.seed,
    )
    ends = np.expm1(drawn.paths[0])
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    paths = [[float(value) for value in np.quantile(day, levels)] for day in ends.T]
    return {"paths": {"days": args.days, "count": args.paths, "levels": levels, "quantiles": paths}} | {
        "risk": asdict(path_risk(drawn, args.level)[0])
    }


def _described(facts: dict[str, Any], level: float) -> str:
    lines = [f"{facts['symbol']} after the close of {facts['date']}: returns from the next close, with odds"]
    lines.append("sessions" + "".join(f"{float(odds):>9.0%}" for odds in next(iter(facts["quantiles"].values()))))
    for horizon, values in facts["quantiles"].items():
        lines.append(f"{horizon:>8}" + "".join(f"{value:>+9.1%}" for value in values.values()))
    if "risk" in facts:
        risk, paths = facts["risk"], facts["paths"]
        lines.append(f"{paths['count']:,} paths of {paths['days']} traded days from this close:")
        lines.append(" " * 8 + "".join(f"{value:>+9.1%}" for value in paths["quantiles"][-1]))
        lines.append(
            f"value at risk {level:.0%}: {risk['value_at_risk']:.1%}; mean loss beyond it"
            f" {risk['expected_shortfall']:.1%}; worst path {risk['worst']:.1%}"
        )
    return "\n".join(lines)


def _calibration(panel: Panel, args: argparse.Namespace) -> int:
    from fireflyer.market.forecast import calibration
    from fireflyer.market.study import Study

    found = calibration(Study.load(args.run).forecast(panel), panel, slice(0, len(panel.dates)))
    if args.json:
        rows = [asdict(row) for row in found]
        for row in rows:  # JSON has no NaN
            row["names_passing"] = None if math.isnan(row["names_passing"]) else row["names_passing"]
        print(json.dumps({"coverage": rows}))
        return 0
    print("sessions  quantile  returns below it          names that pass Kupiec's test at 5 %")
    for row in found:
        passing = "too few days" if math.isnan(row.names_passing) else f"{row.names_passing:.0%}"
        print(f"{row.horizon:>8}{row.level:>10.0%}{row.share:>10.1%} ± {row.standard_error:.1%}{passing:>20}")
    return 0
