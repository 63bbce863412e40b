"""A GRPO run, drawn: rewards, what the policy does, where the time goes, and on a terminal an answer to read."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from fireflyer.checkpoint.run_folder import SAMPLES, read_metrics
from fireflyer.cli.progress import Progress, how_far
from fireflyer.train.events import StepMetrics

_SHOWN = 160


class GrpoProgress(Progress):
    """As `Progress`, with what matters in reinforcement learning. Samples are read from the run's folder."""

    def __init__(self, stream: TextIO, run_dir: str | Path) -> None:
        super().__init__(stream)
        self._run_dir = Path(run_dir)

    def _status(self, total_steps: int) -> tuple[str, str]:
        if "reward" not in self._recent[-1].values:  # the stage before, of a run with several
            return super()._status(total_steps)
        return "  ".join(how_far(self._recent, total_steps)), measures(self._recent[-1])

    def _more_lines(self) -> list[str]:
        if "reward" not in self._recent[-1].values:
            return []
        samples = read_metrics(self._run_dir, name=SAMPLES)
        return [time_spent(self._recent), *(sample_line(sample) for sample in samples[-2:])]


def measures(step: StepMetrics) -> str:
    """One step in a line."""
    v = step.values
    said = [
        f"reward {v['reward']:.3f}",
        f"right {v['accuracy']:.1%}",
        f"form {v['format_reward']:.0%}",
        f"{v['length']:.0f} tokens",
        f"KL {v['kl']:.2g}",
        f"entropy {v['entropy']:.2g}",
        f"clipped {v['clip_share']:.2%}",
        f"gap {v['gap']:.1g}",
    ]
    if v["equal_groups"]:
        said.append(f"alike {v['equal_groups']:.0%}")
    return "  ".join(said)


def time_spent(recent: list[StepMetrics]) -> str:
    """Shares of the time, and the speed of rollouts."""
    parts = {name: sum(step.values[f"{name}_s"] for step in recent) for name in ("rollout", "scoring", "update")}
    total = sum(parts.values()) or 1.0
    shares = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in parts.items())
    return f"time: {shares}; {recent[-1].values['rollout_tokens_per_s']:,.0f} tok/s in rollouts"


def sample_line(sample: dict) -> str:
    """One answer, shortened."""
    text = " ".join(sample["text"].split())
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
    return f"{'✓' if sample['correct'] else '✗'} {sample['reward']:.2f}  {shown}"
