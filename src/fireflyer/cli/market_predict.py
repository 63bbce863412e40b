"""`fireflyer market predict`: the scores of a study's models, for a backtest or for today."""

from __future__ import annotations

import argparse
import json

from fireflyer.cli.market_train import RUN


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    from fireflyer.cli.market_source import add_source

    parser = subparsers.add_parser(
        "predict",
        help="scores of names: all out-of-sample sessions to a file, or the last one's best",
        description="Score every member of every session from the first test on, each by the newest model that was"
        " trained before it. Without --out the best names of the last session are shown.",
    )
    add_source(parser)
    parser.add_argument("--run", metavar="DIR", default=RUN, help=f"a study of market train (default {RUN})")
    parser.add_argument("--out", metavar="FILE", help="write date, symbol, score as CSV, or .parquet")
    parser.add_argument("--top", metavar="N", type=int, default=10, help="names shown of the last session (default 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Do it."""
    import numpy as np

    from fireflyer.cli.market_source import open_source
    from fireflyer.market.scores import write_scores
    from fireflyer.market.study import Study

    panel, study = open_source(args.data), Study.load(args.run)
    scores = study.scores(panel)
    scored = np.isfinite(scores)
    rows = np.flatnonzero(scored.any(1))
    last = int(rows[-1]) if len(rows) else len(panel.dates) - 1
    best = [int(name) for name in np.argsort(-scores[last], kind="stable") if scored[last, name]][: max(args.top, 0)]
    top = [{"symbol": panel.symbols[name], "score": float(scores[last, name])} for name in best]
    lines = write_scores(args.out, panel, scores) if args.out else int(scored.sum())
    if args.json:
        facts = {"scores": lines, "sessions": len(rows), "last": str(panel.dates[last]), "top": top, "out": args.out}
        print(json.dumps(facts))
        return 0
    for place in top if not args.out else []:
        print(f"{panel.dates[last]}  {place['symbol']}  {place['score']:+.3f}")
    span = f"{panel.dates[rows[0]]} to {panel.dates[last]}" if len(rows) else "no session"
    print(f"{lines:,} scores, {span}" + (f": {args.out}" if args.out else ""))
    return 0
