"""The desk's report as one HTML file that asks nothing of any server. In: an `Appraisal`. Out: its text.

What the audit doesn't carry isn't claimed: where a test fails, the head of the page says so before any figure.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from fireflyer import __version__
from fireflyer.market.appraisal import Appraisal
from fireflyer.market.heads import QUANTILES
from fireflyer.market.measure import HORIZONS, Measured, rejected
from fireflyer.market.panel import Dates, Floats
from fireflyer.market.statistics import drawdowns
from fireflyer.report.page import page_part, script_data

_FOLDER = Path(__file__).parent / "page"
_COLOURS = ("--first", "--second", "--third", "--fourth")


def market_page(a: Appraisal, title: str) -> str:
    """The page, styled and scripted as a run's report is."""
    data = {
        "head": _head(a, title),
        "tiles": _tiles(a),
        "charts": [_value(a), _drawdown(a), _coefficients(a), _decay(a), _turnover(a), _fan(a)],
        "maps": _maps(a),
        "tables": _tables(a),
        "version": __version__,
    }
    return (
        (_FOLDER / "market.html")
        .read_text(encoding="utf-8")
        .replace("{{title}}", escape(title))
        .replace("{{style}}", page_part("vendor/uPlot.min.css") + page_part("report.css"))
        .replace("{{data}}", script_data(data))
        .replace("{{library}}", page_part("vendor/uPlot.iife.min.js"))
        .replace("{{script}}", (_FOLDER / "market.js").read_text(encoding="utf-8"))
    )


def _head(a: Appraisal, title: str) -> dict[str, Any]:
    origin, first = a.panel.origin, a.models[0].rank_ic
    members = a.panel.member[a.test].sum(1)
    closes = "closes only" if origin.close_only else "opens, highs, lows and closes"
    if a.audit.passed:
        said = f"RankIC {first.mean:.3f} ± {first.standard_error:.3f}, {first.t:.1f} standard errors"
        sentence = f"{said}; {a.models[0].net:+.1%} a year net of costs, the index {a.models[0].index:+.1%}."
    else:
        sentence = f"The audit {a.audit.verdict()}. No figure on this page can be relied on."
    return {
        "name": title,
        "passed": a.audit.passed,
        "sentence": sentence,
        "facts": [
            ["source", f"{origin.source}; {closes}" + (f"; SHA-256 {origin.sha256[:16]}" if origin.sha256 else "")],
            ["span tested", f"{a.dates[0]} to {a.dates[-1]}, {len(a.dates)} sessions"],
            ["universe", f"{origin.universe}; {members.min()} to {members.max()} members a session"],
            ["costs", a.costs],
            ["audit", a.audit.verdict()],
            ["trials", f"{a.trials} strategies were tried before this one was fixed"],
        ],
    }


def _tiles(a: Appraisal) -> list[list[str]]:
    one = a.models[0]
    return [
        [
            f"{one.rank_ic.mean:.3f}",
            f"RankIC over {a.horizon} sessions",
            f"± {one.rank_ic.standard_error:.3f}, overlap in",
        ],
        [f"{one.rank_ic.icir:.2f}", "ICIR", f"above 0 on {one.rank_ic.positive:.0%} of days"],
        [f"{one.net:+.1%}", "a year, net", f"{one.gross:+.1%} before fees"],
        [f"{one.index:+.1%}", "a year, the index", f"information ratio {one.information_ratio:.2f}"],
        [f"{one.drawdown:.1%}", "worst drawdown", "of the net account"],
        [f"{one.deflated.probability:.0%}", "deflated Sharpe", f"{one.sharpe:.2f} a year; {a.trials} trials"],
        [f"{one.turnover:.1%}", "turnover a session", f"{one.fees_yuan:,.0f} yuan of fees"],
    ]


def _chart(
    key: str, title: str, unit: str, why: str, x: list[Any], lines: list[dict[str, Any]], time: bool = True
) -> Any:
    return {"key": key, "title": title, "unit": unit, "why": why, "x": x, "lines": lines, "time": time}


def _line(name: str, values: Any, colour: str, *, dashed: bool = False, marks: bool = False) -> dict[str, Any]:
    kept = [None if not math.isfinite(value) else round(float(value), 6) for value in np.asarray(values, np.float64)]
    return {"name": name, "values": kept, "colour": colour, "dashed": dashed, "marks": marks}


def _seconds(dates: Dates) -> list[int]:
    return dates.astype("datetime64[s]").astype(np.int64).tolist()


def _gross(one: Measured) -> Floats:
    nav = one.result.nav.astype(np.float64)
    return nav + np.cumsum(one.result.fees)


def _value(a: Appraisal) -> Any:
    index = a.panel.index_close[a.test]
    lines = [
        _line(one.name, one.result.nav / one.result.nav[0], colour)
        for one, colour in zip(a.models, _COLOURS, strict=True)
    ]
    first = a.models[0]
    lines.append(_line("decoder before fees", _gross(first) / first.result.nav[0], _COLOURS[0], dashed=True))
    lines.append(_line("index", index / index[0], "--soft"))
    why = "Each account net of fees, beginning at 1, and the decoder's with its fees given back. Beside the index: what"
    return _chart(
        "value", "Value", "beginning at 1", f"{why} falls and rises with it is no skill.", _seconds(a.dates), lines
    )


def _drawdown(a: Appraisal) -> Any:
    lines = [_line(one.name, drawdowns(one.result.nav), c) for one, c in zip(a.models, _COLOURS, strict=True)]
    lines.append(_line("index", drawdowns(a.panel.index_close[a.test]), "--soft"))
    why = "How far each lies below its highest value so far."
    return _chart("drawdown", "Drawdown", "share", why, _seconds(a.dates), lines)


def _coefficients(a: Appraisal) -> Any:
    lines = [
        _line(one.name, np.cumsum(np.nan_to_num(one.daily[a.test])), c)
        for one, c in zip(a.models, _COLOURS, strict=True)
    ]
    why = "The sessions' RankIC added up: a straight rise is a steady signal, one steep piece is one lucky month."
    return _chart("rank_ic", "RankIC, added up", f"over {a.horizon} sessions", why, _seconds(a.dates), lines)


def _decay(a: Appraisal) -> Any:
    lines = [
        _line(one.name, [c.mean for c in one.decay], colour, marks=True)
        for one, colour in zip(a.models, _COLOURS, strict=True)
    ]
    first = a.models[0].decay
    for sign, name in ((2, "decoder + 2 s.e."), (-2, "decoder - 2 s.e.")):
        values = [c.mean + sign * c.standard_error for c in first]
        lines.append(_line(name, values, _COLOURS[0], dashed=True))
    why = "RankIC over longer and longer stretches: how long the signal lasts, and whether it is told from nothing."
    return _chart("decay", "Decay", "RankIC", why, list(HORIZONS), lines, time=False)


def _turnover(a: Appraisal) -> Any:
    values = a.models[0].result.turnover()
    weekly = np.convolve(values, np.ones(5) / 5)[: len(values)]
    why = "What is bought and sold in a session, one way, the mean of five; each percent costs its fees."
    return _chart(
        "turnover", "Turnover", "share of the account", why, _seconds(a.dates), [_line("decoder", weekly, "--first")]
    )


def _fan(a: Appraisal) -> Any:
    """The closes, then the quantiles at each horizon, sessions counted from the last close."""
    past = [-count for count in range(len(a.closes) - 1, -1, -1)]
    ahead = [1 + horizon for horizon in a.fan.horizons]
    gap, base = [math.nan] * len(ahead), float(a.closes[-1])
    lines = [_line("close", [*a.closes, *gap], "--soft")]
    before = [math.nan] * (len(past) - 1)
    for place, level in enumerate(QUANTILES):
        values = [*before, base, *(base * (1 + a.fan.returns[:, place]))]
        lines.append(_line(f"{level:.0%}", values, "--first", dashed=level != 0.5))
    why = (
        f"{a.fan.symbol} after {a.fan.date}, the name ranked highest: its last closes, and the odds of its price"
        " so many sessions after the next close. Odds, no promise: see the table of calibration."
    )
    return _chart("fan", "Forecast fan", "price", why, [*past, *ahead], lines, time=False)


def _maps(a: Appraisal) -> list[dict[str, Any]]:
    """A MoE layer each: sessions from left to right, experts from above."""
    dates = [str(date) for date in a.dates]
    layers = np.nan_to_num(a.load, nan=1.0).round(3)
    return [{"layer": n + 1, "dates": dates, "load": layers[:, n].tolist()} for n in range(layers.shape[1])]


def _tables(a: Appraisal) -> list[dict[str, Any]]:
    models = [
        [
            one.name,
            f"{one.rank_ic.mean:.4f} ± {one.rank_ic.standard_error:.4f}",
            f"{one.ic.mean:.4f} ± {one.ic.standard_error:.4f}",
            f"{one.rank_ic.icir:.2f}",
            f"{one.gross:+.1%}",
            f"{one.net:+.1%}",
            f"{one.net - one.index:+.1%}",
            f"{one.drawdown:.1%}",
            f"{one.turnover:.1%}",
            f"{one.sharpe:.2f}",
            f"{one.deflated.probability:.0%}",
        ]
        for one in a.models
    ]
    audit = [[f.test, "passed" if f.passed else "FAILED", f.detail] for f in a.audit.findings]
    orders = [[reason, f"{count:,}"] for reason, count in rejected(a.models[0].result).items()]
    calibration = [
        [f"{c.horizon}", f"{c.level:.0%}", f"{c.share:.1%} ± {c.standard_error:.1%}", f"{c.count:,}"]
        for c in a.coverage
    ]
    return [
        {
            "title": "Beside the simpler ones, on the same folds",
            "head": [
                "",
                "RankIC",
                "IC",
                "ICIR",
                "gross",
                "net",
                "net of index",
                "drawdown",
                "turnover",
                "Sharpe",
                "deflated",
            ],
            "rows": models,
        },
        {"title": "Audit", "head": ["test", "", "seen"], "rows": audit},
        {
            "title": "Calibration: how often returns fell below each quantile",
            "head": ["sessions", "quantile", "fell below", "forecasts"],
            "rows": calibration,
        },
        {
            "title": f"Orders that were not filled ({len(a.models[0].result.orders):,} were made)",
            "head": ["reason", "orders"],
            "rows": orders or [["none", "0"]],
        },
    ]
