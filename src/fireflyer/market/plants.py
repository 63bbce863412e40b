"""Nine leaks, each of a kind found in published code, planted into an honest pipeline: what `audit` is there for.

In: an honest `Pipeline`. Out: the same with one mistake in it. For each test of the audit there is one that it must
catch; a leak may ring more than one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fireflyer.market.audit import Lesson, Pipeline
from fireflyer.market.engine import BacktestResult
from fireflyer.market.features import Floats, cross_rank, forward_returns
from fireflyer.market.orders import Order
from fireflyer.market.panel import Panel


@dataclass(frozen=True)
class Plant:
    """An honest pipeline passed through; each leak below changes one thing."""

    honest: Pipeline

    @property
    def horizons(self) -> Sequence[int]:
        return self.honest.horizons

    def features(self, panel: Panel) -> Floats:
        return self.honest.features(panel)

    def scores(self, panel: Panel) -> Floats:
        return self.honest.scores(panel)

    def trade(self, panel: Panel, scores: Floats) -> BacktestResult:
        return self.honest.trade(panel, scores)

    def narrowed(self, names: int) -> Plant:
        return replace(self, honest=self.honest.narrowed(names))

    def relearned(self, panel: Panel, labels: Floats) -> Floats:
        return self.honest.relearned(panel, labels)

    def lessons(self) -> Sequence[Lesson]:
        return self.honest.lessons()


class FullWindowZScore(Plant):
    """Features scaled by mean and deviation of the whole panel, the days to come among them."""

    def features(self, panel: Panel) -> Floats:
        found = self.honest.features(panel)
        return (found - np.nanmean(found, axis=(0, 1))) / np.nanstd(found, axis=(0, 1))


class TargetEncoding(Plant):
    """What is learned from is also looked up: a score leans on the label of its own row."""

    def relearned(self, panel: Panel, labels: Floats) -> Floats:
        scores = self.honest.relearned(panel, labels)
        own = np.where(np.isfinite(labels), cross_rank(labels, np.isfinite(labels)), 0.0)
        return scores + np.nanstd(scores) * own


class ShiftedIndex(Plant):
    """Scores stand a session too early: what was known at t+1 is dated t."""

    def scores(self, panel: Panel) -> Floats:
        found = self.honest.scores(panel)
        early = np.full_like(found, np.nan)
        early[:-1] = found[1:]
        return np.where(panel.member, early, np.nan)


class LabelAsFeature(Plant):
    """The label stands among the features."""

    def features(self, panel: Panel) -> Floats:
        label = forward_returns(panel, self.horizons[0])
        return np.concatenate([self.honest.features(panel), label[..., None]], axis=-1)


class SameBarFill(Plant):
    """Filled at the close that the signal was made of."""

    def trade(self, panel: Panel, scores: Floats) -> BacktestResult:
        result = self.honest.trade(panel, scores)
        return replace(result, fills=[replace(fill, fill_row=fill.signal_row) for fill in result.fills])


class NoPurge(Plant):
    """Learned up to the last session before the test, by labels that reach into it."""

    def lessons(self) -> Sequence[Lesson]:
        eve = [str(np.datetime64(lesson.tested[0]) - 1) for lesson in self.honest.lessons()]
        return [
            replace(lesson, learned=(lesson.learned[0], day))
            for lesson, day in zip(self.honest.lessons(), eve, strict=True)
        ]


class SurvivorsUniverse(Plant):
    """Only names that are still members at the end."""

    def scores(self, panel: Panel) -> Floats:
        return np.where(panel.member[-1], self.honest.scores(panel), np.nan)


class TooGood(Plant):
    """A signal that knows a little of what is to come."""

    def scores(self, panel: Panel) -> Floats:
        scores = self.honest.scores(panel)
        label = forward_returns(panel, self.horizons[0])
        hint = cross_rank(label, np.isfinite(label))
        own = cross_rank(scores, np.isfinite(scores))
        return own + 0.3 * np.nan_to_num(hint)


class OrderOfTheProcess(Plant):
    """Equal scores are ordered by what differs from process to process."""

    def trade(self, panel: Panel, scores: Floats) -> BacktestResult:
        result = self.honest.trade(panel, scores)
        return replace(result, orders=[*result.orders, Order(panel.symbols[0], os.getpid(), 0)])


PLANTS: dict[str, tuple[type[Plant], str]] = {
    "full-window-z-score": (FullWindowZScore, "future changed"),
    "target-encoding": (TargetEncoding, "labels shuffled"),
    "shifted-index": (ShiftedIndex, "signal shifted"),
    "label-as-feature": (LabelAsFeature, "oracle seen"),
    "same-bar-fill": (SameBarFill, "execution"),
    "no-purge": (NoPurge, "folds"),
    "survivors-universe": (SurvivorsUniverse, "universe"),
    "knows-a-little": (TooGood, "too good"),
    "order-of-the-process": (OrderOfTheProcess, "determinism"),
}
"""By the name to type: the leak, and the test that must catch it."""
