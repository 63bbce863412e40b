"""The layout that trains a model fastest on a cluster, among those that fit: all are tried. Arithmetic, no torch."""

from __future__ import annotations

from fireflyer.cost.judge import Judge, TrainingPlan
from fireflyer.cost.layouts import Job, Wanted, layouts


def search(job: Job, wanted: Wanted | None = None, must_fit: bool = True) -> TrainingPlan | None:
    """The fastest layout that fits, or of all where not `must_fit`; None: there is none. Equals: the smaller memory."""
    judge, best = Judge(job), None
    for layout in layouts(job, wanted or Wanted()):
        plan = judge(layout, at_most=best.step.total if best else None)
        if plan and (plan.fits or not must_fit) and (best is None or _order(plan) < _order(best)):
            best = plan
    return best


def _order(plan: TrainingPlan) -> tuple[float, float]:
    return plan.step.total, plan.memory.total


def leanest(job: Job, wanted: Wanted | None = None) -> TrainingPlan | None:
    """The layout with the least memory a rank, fitting or not; None: no layout divides."""
    judge = Judge(job)
    plans = (judge(layout) for layout in layouts(job, wanted or Wanted()))
    return min((plan for plan in plans if plan), key=lambda plan: plan.memory.total, default=None)
