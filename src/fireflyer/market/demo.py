"""The market's demo: a small decoder learns two folds of real bars, is traded, audited, and reported on one page.

In: a folder. Out: a study like any other, with summary.json and report.html beside its models. The same call again goes
on where it stopped; a finished demo is only read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import SUMMARY, writing
from fireflyer.errors import UserError
from fireflyer.market.appraisal import Appraisal, appraise
from fireflyer.market.audit import DATES
from fireflyer.market.engine import BacktestSettings
from fireflyer.market.panel import Panel
from fireflyer.market.recipe import MarketRecipe
from fireflyer.market.report import market_page
from fireflyer.market.study import study_folds, train_study
from fireflyer.train.events import Event

FOLDS = 2
REPORT = "report.html"


def run_demo(
    panel: Panel,
    recipe: MarketRecipe,
    run_dir: Path,
    *,
    audit_dates: int = DATES,
    on_event: Callable[[Event], None] = lambda event: None,
    on_part: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """The last two folds that the panel holds. Returns what summary.json holds.

    Raises UserError where `run_dir` holds another study, Stopped where `should_stop` said so and all is saved.
    """
    folds = study_folds(panel, recipe.market)[-FOLDS:]
    study = train_study(panel, folds, recipe, run_dir, on_event=on_event, should_stop=should_stop)
    key = {"sha256": panel.origin.sha256, "source": panel.origin.source, "models": [m.record for m in study.models]}
    if stored := _stored(run_dir, key):
        return {**stored, "run_dir": str(run_dir), "report": str(run_dir / REPORT)}  # it may have been moved
    found = appraise(
        panel, study, BacktestSettings(), audit_dates=audit_dates, on_part=on_part, should_stop=should_stop
    )
    write_report(found, run_dir / REPORT, run_dir.resolve().name)
    facts = {"run_dir": str(run_dir), **found.figures(), "report": str(run_dir / REPORT), "of": key}
    with writing(run_dir):
        write_text(run_dir / SUMMARY, json.dumps(facts, indent=1) + "\n")
    return facts


def write_report(found: Appraisal, path: Path, title: str) -> None:
    """One HTML file. Raises UserError where the disk refuses."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, market_page(found, title))


def _stored(run_dir: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """A finished demo's summary, if it is of these very models and bars."""
    path = run_dir / SUMMARY
    if not path.is_file() or not (run_dir / REPORT).is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path}: can't be read; remove it, and the demo writes it again") from None
    return found if found.get("of") == json.loads(json.dumps(key)) else None
