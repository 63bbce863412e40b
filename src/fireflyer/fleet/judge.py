"""How an attempt ended and what becomes of its task: a pure function of the ranks' end records.

every rank 0                            done
the shepherd killed it                  unsaved: it goes on from its last whole checkpoint
75 (and 0)                              saved: it goes on
another code after TERM                 unsaved: it goes on
a rank without a record                 lost (its node or its shepherd): it goes on
another code by itself                  failed, unless it may be restarted
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from fireflyer.fleet.ledger import AttemptRow, End, TaskRow
from fireflyer.fleet.records import Ended

STOPPED_CODE = 75
GANG = "gang"
"""How the reason begins when an attempt is stopped since one of its ranks failed."""
IDLE_STOPS = 3
"""So many attempts in a row may end with 75 unasked and nothing new saved."""


def judge(task: TaskRow, attempt: AttemptRow, ranks: Sequence[Ended | None], last_step: int | None) -> End:
    """Judge an attempt that is over.

    Args:
        ranks: each rank's end record; None where there will be none.
        last_step: what the task had saved before this attempt.
    """
    known = [rank for rank in ranks if rank is not None]
    lead = ranks[0]
    ran_s = max([rank.ran_s for rank in known], default=0.0)
    cpu_s = sum(rank.cpu_s for rank in known)
    stops = [rank.stop_s for rank in known if rank.stop_s is not None]
    stop_s = max(stops, default=None)
    outcome, reason, code, kept_s = _outcome(task, attempt, ranks, ran_s, stop_s)
    step = lead.saved_step if lead is not None else None
    idle = outcome == "saved" and attempt.stop_at is None and not stops and step == last_step
    state = "waiting"
    if outcome == "done":
        state = "done"
    elif task.stop_asked:
        state, reason = "stopped", f"stopped on request; {reason}"
    elif outcome == "failed" and task.failures >= task.restarts:
        state = "failed"
    elif idle and task.idle_stops + 1 >= IDLE_STOPS:
        state, reason = "failed", f"exit code 75 unasked, {IDLE_STOPS} times in a row, and nothing new saved"
    return End(
        outcome,
        reason,
        state,
        exit_code=code,
        saved_step=step,
        kept_s=kept_s,
        lost_s=ran_s - kept_s,
        stop_s=stop_s,
        cpu_s=cpu_s,
        failure=outcome == "failed",
        idle_stop=idle,
    )


def _outcome(
    task: TaskRow, attempt: AttemptRow, ranks: Sequence[Ended | None], ran_s: float, stop_s: float | None
) -> tuple[str, str, int | None, float]:
    """(outcome, reason, exit code, seconds of work kept)."""
    missing = [attempt.nodes[number] for number, rank in enumerate(ranks) if rank is None]
    known = [rank for rank in ranks if rank is not None]
    lead = ranks[0]
    since_save_s = lead.since_save_s if lead is not None else None
    kept_s = 0.0 if since_save_s is None else max(0.0, ran_s - since_save_s)
    after = "nothing saved" if since_save_s is None else f"{since_save_s:.1f} s since its last save are lost"
    if missing:
        return "lost", f"contact lost on {', '.join(missing)}: no end was recorded; {after}", None, kept_s
    if all(rank.code == 0 for rank in known):
        return "done", "done", 0, ran_s
    number, bad, by_itself = _first_bad(attempt, known)
    where = f"rank {number} on {attempt.nodes[number]}: " if len(ranks) > 1 else ""
    if bad is not None and by_itself:
        return "failed", bad.error or f"{where}{say_code(bad.code)}", bad.code, kept_s
    killed = next((rank for rank in known if rank.killed), None)
    if killed is not None:
        return "unsaved", f"not stopped {task.deadline_s:g} s after TERM, killed; {after}", killed.code, kept_s
    if bad is None:
        return _saved(task, lead, ran_s, stop_s)
    return "unsaved", f"{where}{say_code(bad.code)} after TERM instead of saving; {after}", bad.code, kept_s


def _first_bad(attempt: AttemptRow, ranks: Sequence[Ended]) -> tuple[int, Ended | None, bool]:
    """A rank whose code is neither 0 nor 75, and whether it failed by itself: such a one took the others along.

    A command may end on TERM before its shepherd hears of it, so a rank of an attempt that was asked to stop counts as
    failed by itself only where that was the reason to ask.
    """
    bad = [(number, rank) for number, rank in enumerate(ranks) if rank.code not in (0, STOPPED_CODE)]
    failed_first = (attempt.stop_why or "").startswith(GANG)
    for number, rank in bad:
        if rank.stop_s is None and (attempt.stop_at is None or (failed_first and rank.code != -signal.SIGTERM)):
            return number, rank, True
    number, rank = next(iter(bad), (0, None))
    return number, rank, False


def _saved(task: TaskRow, lead: Ended | None, ran_s: float, stop_s: float | None) -> tuple[str, str, int, float]:
    """Exit code 75, held against what the run folder shows."""
    assert lead is not None
    if lead.since_save_s is None:
        if task.run_dir is None:
            return "saved", "stopped (exit code 75)", STOPPED_CODE, ran_s
        why = lead.damage or "its run folder has no checkpoint of this attempt"
        return "saved", f"exit code 75, but nothing new saved: {why}", STOPPED_CODE, 0.0
    unsaved_s = max(0.0, lead.since_save_s - (stop_s or 0.0))
    reason = f"saved step {lead.saved_step}" if lead.saved_step is not None else "saved"
    if lead.damage:
        reason += f", passing over {lead.damage}"
    return "saved", reason, STOPPED_CODE, max(0.0, ran_s - unsaved_s)


def say_code(code: int) -> str:
    """exit code 3; or what signal."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"
