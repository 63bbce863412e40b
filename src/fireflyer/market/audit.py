"""Nine tests for the ways in which a backtest comes to know the future; plants.py shows that each can fail.

In: a `Pipeline`, from bars to orders, and the panel that it is judged on. Out: an `Audit`, nine findings in words.

1 future changed    what is known at t does not move by a bit when everything after t is noise, NaN, or cut off
2 labels shuffled   learned and judged anew on labels shuffled within each day, nothing is left
3 signal shifted    against single sessions' returns, the signal knows none that it hasn't seen
4 oracle seen       no feature is the label; and the label itself, scored, rings the alarm
5 execution         fills come after their signals, within the limits, of names that trade, never sold on the day
6 folds             what is learned from ends, labels and scalers too, before what is tested begins
7 universe          members of the day are scored, those that will leave like those that will stay
8 too good          RankIC above .10, a net Sharpe ratio above 3 or a curve that never falls is a leak till proven
9 determinism       the same orders from another process
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Protocol

import numpy as np

from fireflyer.errors import UserError
from fireflyer.market.audit_fills import wrong_fill
from fireflyer.market.engine import BacktestResult
from fireflyer.market.features import EXECUTION_LAG, Floats, forward_returns, known_bars, log_returns
from fireflyer.market.orders import order_hash
from fireflyer.market.panel import How, Panel
from fireflyer.market.statistics import Coefficient, coefficient, daily_ic, drawdowns, sharpe

TESTS = (
    "future changed",
    "labels shuffled",
    "signal shifted",
    "oracle seen",
    "execution",
    "folds",
    "universe",
    "too good",
    "determinism",
)
MOST_RANK_IC = 0.10
MOST_SHARPE = 3.0
MOST_OF_A_FEATURE = 0.30
"""RankIC of one feature alone; the label's own is 1."""
DATES = 50
SHUFFLES = 3
SMALL_NAMES, SMALL_SESSIONS = 20, 200
"""Of the part of a panel on which everything is computed again and again. Causality is a property of the code."""
_HOWS: tuple[How, ...] = ("noise", "nan", "truncate")
_ERRORS = 3.0


@dataclass(frozen=True)
class Lesson:
    """What one model learned from, and what it is tested on; ISO dates of sessions, first and last.

    scaled: the span whose statistics scale its inputs; None where every statistic is of the same day or trailing.
    """

    learned: tuple[str, str]
    tested: tuple[str, str]
    scaled: tuple[str, str] | None = None


class Pipeline(Protocol):
    """From bars to orders, learned already. All of it must be a function of the panel alone."""

    @property
    def horizons(self) -> Sequence[int]:
        """Sessions that labels reach over; the first is the one that the signal is judged by."""
        ...

    def features(self, panel: Panel) -> Floats:
        """(D, N, F), NaN where there is none."""
        ...

    def scores(self, panel: Panel) -> Floats:
        """(D, N), NaN where there is none."""
        ...

    def trade(self, panel: Panel, scores: Floats) -> BacktestResult:
        """What is ordered and filled."""
        ...

    def narrowed(self, names: int) -> Pipeline:
        """The same for a panel of few names: one that held them all would trade alike whatever the scores."""
        ...

    def relearned(self, panel: Panel, labels: Floats) -> Floats:
        """(D, N) scores of the test spans by something small that learned these labels (D, N) in the same folds."""
        ...

    def lessons(self) -> Sequence[Lesson]:
        """Of each fold, in order."""
        ...


@dataclass(frozen=True)
class Finding:
    """One test's outcome; `detail` says what was seen."""

    test: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Audit:
    """The findings of the tests that were run, in the order of `TESTS`."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """All nine, and every one."""
        return len(self.findings) == len(TESTS) and not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(finding.test for finding in self.findings if not finding.passed)

    def verdict(self) -> str:
        """For the head of a report."""
        count = len(self.findings)
        if self.failed:
            return f"failed {len(self.failed)} of {count} leak tests: {', '.join(self.failed)}"
        left = [test for test in TESTS if test not in {finding.test for finding in self.findings}]
        return f"passed {count} of {len(TESTS)} leak tests" + (f"; not run: {', '.join(left)}" if left else "")


def audit(
    pipeline: Pipeline,
    panel: Panel,
    *,
    only: Sequence[str] = TESTS,
    seed: int = 0,
    dates: int = DATES,
    on_finding: Callable[[Finding], None] | None = None,
) -> Audit:
    """Run all nine, or `only` some of `TESTS`. Raises UserError where the pipeline scores nothing in the panel."""
    scores = pipeline.scores(panel)
    if not np.isfinite(scores).any():
        raise UserError(f"{panel.origin.source}: no score on any session; an audit needs a test span within the panel")
    result = pipeline.trade(panel, scores)
    horizon = pipeline.horizons[0]
    small = _small(panel, scores, seed)
    narrow = pipeline.narrowed(len(small.symbols))
    tests: dict[str, Callable[[], Finding]] = {
        "future changed": lambda: _future_changed(narrow, small, dates, seed),
        "labels shuffled": lambda: _labels_shuffled(pipeline, panel, scores, seed),
        "signal shifted": lambda: _signal_shifted(panel, scores),
        "oracle seen": lambda: _oracle_seen(pipeline, panel, scores),
        "execution": lambda: _execution(panel, result),
        "folds": lambda: _folds(panel, pipeline),
        "universe": lambda: _universe(panel, scores, result),
        "too good": lambda: _too_good(panel, scores, result, horizon),
        "determinism": lambda: _determinism(narrow, small),
    }
    findings = []
    for test in (test for test in TESTS if test in only):
        findings.append(tests[test]())
        if on_finding is not None:
            on_finding(findings[-1])
    return Audit(tuple(findings))


def audit_result(panel: Panel, scores: Floats, result: BacktestResult, horizon: int) -> Audit:
    """Those tests that need no model: for scores that come from a file."""
    return Audit(
        (
            _signal_shifted(panel, scores),
            _execution(panel, result),
            _universe(panel, scores, result),
            _too_good(panel, scores, result, horizon),
        )
    )


# --- The nine


def _future_changed(pipeline: Pipeline, panel: Panel, dates: int, seed: int) -> Finding:
    rng = np.random.default_rng([seed, 1])
    features, scores = pipeline.features(panel), pipeline.scores(panel)
    orders = pipeline.trade(panel, scores).orders
    rows = np.flatnonzero(np.isfinite(scores).any(1))
    rows = rows[rows < len(panel.dates) - 1]
    chosen = np.sort(rng.choice(rows, min(dates, len(rows)), replace=False)).tolist()
    for row in chosen:
        for how in _HOWS:
            other = panel.replace_future(row, how, rng)
            found = pipeline.scores(other)
            pairs = {"features": (features, pipeline.features(other)), "scores": (scores, found)}
            moved = [name for name, (a, b) in pairs.items() if not _same(a[: row + 1], b[: row + 1])]
            ours = [order for order in orders if order.signal_row <= row]
            theirs = [order for order in pipeline.trade(other, found).orders if order.signal_row <= row]
            moved += ["orders"] if ours != theirs else []
            if moved:
                what = {"noise": "noise", "nan": "NaN", "truncate": "cut off"}[how]
                told = f"with everything after {panel.dates[row]} {what}, earlier {' and '.join(moved)} change"
                return Finding("future changed", False, told)
    told = (
        f"{len(chosen)} dates, the future noise, NaN and cut off: earlier features, scores and orders equal to the bit"
    )
    return Finding("future changed", True, told)


def _labels_shuffled(pipeline: Pipeline, panel: Panel, scores: Floats, seed: int) -> Finding:
    horizon = pipeline.horizons[0]
    label = forward_returns(panel, horizon)
    found: list[Coefficient] = []
    loud = 0
    for shuffle in range(SHUFFLES):
        shuffled = _within_days(label, np.random.default_rng([seed, 2, shuffle]))
        each = [
            coefficient(daily_ic(values, shuffled), horizon) for values in (scores, pipeline.relearned(panel, shuffled))
        ]
        loud += any(abs(c.t) > _ERRORS for c in each)
        found += each
    worst = max(found, key=lambda c: abs(c.t))
    told = f"RankIC {worst.mean:+.3f}, {abs(worst.t):.1f} standard errors at most, labels shuffled {SHUFFLES} times"
    return Finding("labels shuffled", loud * 2 <= SHUFFLES, told)  # one of three may be chance


def _signal_shifted(panel: Panel, scores: Floats) -> Finding:
    returns = log_returns(panel)
    curve: list[Coefficient] = []
    for ahead in range(-1, EXECUTION_LAG + 5):
        later = np.full_like(returns, np.nan)
        if ahead < 0:
            later[-ahead:] = returns[:ahead]
        else:
            later[: len(returns) - ahead] = returns[ahead:]
        curve.append(coefficient(daily_ic(scores, later), 1))
    unseen = curve[2:]
    shown = ", ".join(f"{c.mean:+.3f}" for c in unseen)
    wrong = [ahead for ahead, c in enumerate(unseen, start=1) if abs(c.mean) > MOST_RANK_IC and abs(c.t) > _ERRORS]
    if wrong:
        told = (
            f"RankIC {unseen[wrong[0] - 1].mean:+.3f} with the return of the session t+{wrong[0]}, which t can't know"
        )
        return Finding("signal shifted", False, f"{told} (t+1 on: {shown})")
    return Finding(
        "signal shifted", True, f"RankIC with the single sessions t+1 on: {shown}; none beyond {MOST_RANK_IC}"
    )


def _oracle_seen(pipeline: Pipeline, panel: Panel, scores: Floats) -> Finding:
    test, horizon = "oracle seen", pipeline.horizons[0]
    label = forward_returns(panel, horizon)
    oracle = coefficient(daily_ic(label, label), horizon)
    if oracle.mean < 0.99 or not _alarms(oracle, None):
        return Finding(test, False, f"the label scored as a signal has RankIC {oracle.mean:.3f}: the audit is blind")
    features = pipeline.features(panel)
    rows = np.isfinite(scores).any(1)
    best, place = 0.0, 0
    for number in range(features.shape[-1]):
        one = coefficient(daily_ic(features[rows, :, number].astype(np.float64), label[rows]), horizon)
        if np.isfinite(one.mean) and abs(one.mean) > abs(best):
            best, place = one.mean, number
    told = f"feature {place + 1} of {features.shape[-1]} alone has RankIC {best:+.3f}"
    if abs(best) > MOST_OF_A_FEATURE:
        return Finding(test, False, f"{told} with the label: it is made of it")
    return Finding(
        test, True, f"the label as a signal has RankIC {oracle.mean:.2f} and is caught; no feature is it: {told}"
    )


def _execution(panel: Panel, result: BacktestResult) -> Finding:
    if wrong := wrong_fill(panel, result.fills):
        return Finding("execution", False, wrong)
    told = f"{len(result.fills):,} fills, each after its signal, within the limits, of a name that trades, under T+1"
    return Finding("execution", True, told)


def _folds(panel: Panel, pipeline: Pipeline) -> Finding:
    test, dates, reach = "folds", panel.dates, EXECUTION_LAG + max(pipeline.horizons)
    gap = len(dates)
    for lesson in pipeline.lessons():
        last, first = panel.row(lesson.learned[1]), panel.row(lesson.tested[0])
        said = f"learned to {lesson.learned[1]}, tested from {lesson.tested[0]}"
        if last + reach >= first:
            return Finding(test, False, f"{said}: labels of {max(pipeline.horizons)} sessions reach into the test")
        if lesson.scaled is not None and panel.row(lesson.scaled[1]) >= first:
            return Finding(test, False, f"{said}: inputs are scaled by statistics up to {lesson.scaled[1]}")
        gap = min(gap, first - last - reach)
    told = f"{len(pipeline.lessons())} folds; the last label ends {gap} sessions or more before the test begins"
    return Finding(test, True, told)


def _universe(panel: Panel, scores: Floats, result: BacktestResult) -> Finding:
    test, scored = "universe", np.isfinite(scores)
    column = {symbol: place for place, symbol in enumerate(panel.symbols)}

    def fail(detail: str) -> Finding:
        return Finding(test, False, detail)

    if (outside := scored & ~panel.member).any():
        row, name = (int(place[0]) for place in np.nonzero(outside))
        return fail(f"{panel.dates[row]} {panel.symbols[name]} is scored, and is no member that day")
    for order in result.orders:
        if order.shares > 0 and not panel.member[order.signal_row, column[order.symbol]]:
            return fail(f"{panel.dates[order.signal_row]} {order.symbol} is bought, and is no member that day")
    if panel.origin.universe == "survivors":
        return fail("survivors: the names were chosen by who is there today")
    rows = np.flatnonzero(scored.any(1))
    span = slice(int(rows[0]), int(rows[-1]) + 1)
    there = (panel.member & known_bars(panel))[span]
    count, members = scored[span].sum(1), there.sum(1)
    if (shrunken := (count * 2 < members)).any():
        row = int(np.argmax(shrunken))
        return fail(f"{panel.dates[span][row]}: {count[row]} scored of {members[row]} members with bars")
    stays = np.broadcast_to(panel.member[-1], there.shape)
    shares = [float((scored[span] & group).sum() / max(group.sum(), 1)) for group in (there & stays, there & ~stays)]
    if (there & ~stays).sum() >= 50 and shares[1] < shares[0] / 2:
        return fail(
            f"survivors: of members that will leave {shares[1]:.0%} are scored, of those that stay {shares[0]:.0%}"
        )
    never = not (panel.member[span] != panel.member[span][0]).any()
    if panel.origin.universe == "point-in-time" and never and panel.shape[1] >= 100 and len(there) >= 244:
        return fail(f"survivors: said to be point-in-time, and in {len(there)} sessions no name comes or goes")
    held = count[members > 0]
    return Finding(
        test, True, f"{held.min()} to {held.max()} names a session, members all; leavers are scored like stayers"
    )


def _too_good(panel: Panel, scores: Floats, result: BacktestResult, horizon: int) -> Finding:
    found = coefficient(daily_ic(scores, forward_returns(panel, horizon)), horizon)
    begun = np.flatnonzero(result.traded > 0)
    value = result.nav[int(begun[0]) :].astype(np.float64) if len(begun) else np.ones(1)
    alarms = _alarms(found, value)
    if alarms:
        return Finding(
            "too good", False, f"{'; '.join(alarms)}: look for a leak in labels, scaling, universe and fills"
        )
    ratio = sharpe(value[1:] / value[:-1] - 1)
    return Finding("too good", True, f"RankIC {found.mean:.3f}, net Sharpe ratio {ratio:.2f}: no miracle")


def _alarms(found: Coefficient, value: Floats | None) -> list[str]:
    """What is too good to be true of a RankIC and of an account's value by day."""
    alarms = [f"RankIC {found.mean:.3f} is above {MOST_RANK_IC}"] if found.mean > MOST_RANK_IC else []
    if value is not None and len(value) > 20:
        ratio = sharpe(value[1:] / value[:-1] - 1)
        alarms += [f"net Sharpe ratio {ratio:.1f} is above {MOST_SHARPE:g}"] if ratio > MOST_SHARPE else []
        if value[-1] > value[0] and drawdowns(value).min() > -0.001:
            alarms.append("the account never falls")
    return alarms


def _determinism(pipeline: Pipeline, panel: Panel) -> Finding:
    here = _order_hash(pipeline, panel)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = pool.submit(_order_hash, pipeline, panel).result()
    if here != there:
        return Finding("determinism", False, f"orders {here[:12]} here, {there[:12]} in another process")
    return Finding("determinism", True, f"orders {here[:12]} here and in another process")


# --- Parts


def _order_hash(pipeline: Pipeline, panel: Panel) -> str:
    return order_hash(pipeline.trade(panel, pipeline.scores(panel)).orders)


def _small(panel: Panel, scores: Floats, seed: int) -> Panel:
    """The last sessions with scores, and some names of those that are scored there."""
    rows = np.flatnonzero(np.isfinite(scores).any(1))
    stop = int(rows[-1]) + 1
    start = max(0, stop - SMALL_SESSIONS)
    names = np.flatnonzero(np.isfinite(scores[start:stop]).any(0))
    chosen = np.random.default_rng([seed, 0]).permutation(names)[:SMALL_NAMES]
    return panel.slice(start, stop).select([panel.symbols[name] for name in np.sort(chosen).tolist()])


def _within_days(label: Floats, rng: np.random.Generator) -> Floats:
    shuffled = np.full_like(label, np.nan)
    for row, values in enumerate(label):
        known = np.flatnonzero(np.isfinite(values))
        shuffled[row, known] = values[rng.permutation(known)]
    return shuffled


def _same(a: Floats, b: Floats) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=True)
