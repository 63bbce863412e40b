"""What a finished run says about itself: `summary.json`, and how a later start knows that nothing is left to do."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import SUMMARY, writing
from fireflyer.train.settings import Recipe

_STATUS = Path("/proc/self/status")
RECENT_STEPS = 100


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    `loss`, `mtp_loss`, `balance_loss`, `max_vio` and `tokens_per_s` are means over the last 100 steps; `eval_loss` and
    `bits_per_byte` of the final weights (None without held-out evaluation). `train_s` is the wall time of the loop over
    all resumptions; `flops` the forward and backward passes', MTP's included. `steps_asked`, `tokens_asked` and
    `epochs_asked` are the length that the command gave.
    """

    step: int
    tokens: int
    loss: float | None
    mtp_loss: float | None
    balance_loss: float | None
    max_vio: float | None
    tokens_per_s: float | None
    eval_loss: float | None
    bits_per_byte: float | None
    train_s: float
    flops: float
    parameters: int
    peak_memory_bytes: int
    checkpoint: str
    steps_asked: int | None
    tokens_asked: int | None
    epochs_asked: float | None


def write_summary(run_dir: Path, summary: Summary) -> None:
    """Write `summary.json`, anew: what others added to that of a shorter run holds no longer. Raises UserError."""
    with writing(run_dir / SUMMARY):
        write_text(run_dir / SUMMARY, json.dumps(asdict(summary), indent=1, allow_nan=False) + "\n")


def finished_summary(run_dir: Path, recipe: Recipe) -> Summary | None:
    """The summary of a run that is at the end `recipe` asks for; None where something is left to do."""
    found = _read(run_dir)
    names = [field.name for field in fields(Summary)]
    if any(name not in found for name in names):
        return None
    summary = Summary(**{name: found[name] for name in names})
    asked = (summary.steps_asked, summary.tokens_asked, summary.epochs_asked)
    return summary if asked == (recipe.steps, recipe.tokens, recipe.epochs) else None


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident."""
    status = _STATUS.read_text(encoding="utf-8", errors="replace") if _STATUS.is_file() else ""
    if "VmHWM:" in status:  # getrusage's peak begins with that of the process which started this one
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read(run_dir: Path) -> dict[str, Any]:
    try:
        found = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
