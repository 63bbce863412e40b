"""`fireflyer market data`: what bars there are, how whole they are, and the same bars as one file."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fireflyer.market.panel import Panel


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser = subparsers.add_parser(
        "data",
        help="what a source of bars holds, checked; --out writes it as one CSV or Parquet file",
        description="Read bars, check them, and say what they are: span, names a day, suspensions, price limits met,"
        " sessions that the exchange had and the bars have not.",
    )
    add_source(parser)
    parser.add_argument("--out", metavar="FILE", help="write date, symbol and bars as CSV, or .parquet; a new file")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    from fireflyer.cli.market_source import open_source

    panel = open_source(args.data)
    facts = described(panel)
    if args.out:
        from fireflyer.market.data.writing import write_panel

        facts["written"] = write_panel(args.out, panel)
    if args.json:
        print(json.dumps(facts))
        return 0
    names = facts["names_a_session"]
    lines = [
        f"source      {facts['source']}",
        f"sessions    {facts['sessions']:,}, {facts['first']} to {facts['last']}",
        f"names       {facts['names']:,}; members a session {names['least']} to {names['most']}",
        f"bars        {facts['bars']:,}, {', '.join(facts['columns'])}"
        + ("; nominal prices, from 10.00" if facts["nominal_prices"] else ""),
        f"no bar      {facts['members_without_bar']:,} times a member had none",
        f"at a limit  {facts['at_upper_limit']:,} closes at the upper, {facts['at_lower_limit']:,} at the lower",
        f"universe    {facts['universe']}",
        f"index       {facts['index_return']:+.1%} over the span",
    ]
    if facts["sessions_missing"] is not None:
        missing = facts["sessions_missing"]
        lines.append(
            f"calendar    {len(missing)} of Shanghai's sessions missing" + (f": {missing[0]}" if missing else "")
        )
    print("\n".join(lines))
    if args.out:
        print(f"{facts['written']:,} bars: {args.out}")
    return 0


def described(panel: Panel) -> dict[str, Any]:
    """What the verb prints."""
    import numpy as np

    from fireflyer.market.features import at_limit

    counts = panel.member.sum(axis=1)
    up, down = at_limit(panel)
    there = [name for name in ("open", "high", "low", "volume", "amount") if getattr(panel, name) is not None]
    return {
        "source": panel.origin.source,
        "sha256": panel.origin.sha256,
        "universe": panel.origin.universe,
        "nominal_prices": panel.origin.nominal_prices,
        "columns": ["close", *there],
        "first": str(panel.dates[0]),
        "last": str(panel.dates[-1]),
        "sessions": len(panel.dates),
        "names": len(panel.symbols),
        "names_a_session": {"least": int(counts.min()), "most": int(counts.max())},
        "bars": int(panel.traded.sum()),
        "members_without_bar": int((panel.member & ~panel.traded).sum()),
        "at_upper_limit": int(up.sum()),
        "at_lower_limit": int(down.sum()),
        "index_return": float(panel.index_close[-1] / panel.index_close[0] - 1),
        "sessions_missing": None if panel.origin.universe == "synthetic" else missing_sessions(np.asarray(panel.dates)),
    }


def missing_sessions(dates: Any) -> list[str] | None:
    """Sessions of Shanghai within the dates' span that they lack; None where no calendar knows the span."""
    try:
        import exchange_calendars
    except ImportError:
        return None
    calendar = exchange_calendars.get_calendar("XSHG")
    first, last = str(dates[0]), str(dates[-1])
    if first < str(calendar.first_session.date()) or last > str(calendar.last_session.date()):
        return None
    there = set(dates.astype(str).tolist())
    return [day for day in calendar.sessions_in_range(first, last).strftime("%Y-%m-%d") if day not in there]
