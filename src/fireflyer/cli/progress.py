"""A run's events, drawn: a live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

from typing import TextIO

from fireflyer.cli.live import LiveLine
from fireflyer.train.events import Evaluated, Event, Finished, Notice, Saved, Started, StepDone, StepMetrics


class Progress(LiveLine):
    """Prints a run's events to `stream`. With `usd_per_hour` the cost so far stands beside the time left."""

    def __init__(self, stream: TextIO, usd_per_hour: float | None = None) -> None:
        super().__init__(stream)
        self._usd_per_hour = usd_per_hour
        self._bits_per_byte: float | None = None
        self._recent: list[StepMetrics] = []

    def on_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, Evaluated):
            self._bits_per_byte = event.values.get("bits_per_byte")
            self.note(f"step {event.step:,}: {_scores(event.values)}")
        else:
            self.note(_sentence(event, self._recent, self._bits_per_byte))

    def _step(self, event: StepDone) -> None:
        self._recent = [*self._recent[-19:], event.metrics]
        progress, measures = self._status(event.total_steps)
        below = "\n".join([measures, *self._more_lines()]) if self.is_terminal else ""
        self.show(event.metrics.step, event.total_steps, progress, below, f"{progress}  {measures}")

    def _status(self, total_steps: int) -> tuple[str, str]:
        return status(self._recent, total_steps, self._bits_per_byte, self._usd_per_hour)

    def _more_lines(self) -> list[str]:
        """What a terminal shows below the measures."""
        return []


def status(
    recent: list[StepMetrics], total_steps: int, bits_per_byte: float | None, usd_per_hour: float | None
) -> tuple[str, str]:
    """How far the run is, and how well: speed and time left from the mean of the recent steps."""
    now = recent[-1]
    progress = how_far(recent, total_steps)
    if usd_per_hour is not None:
        progress.append(f"${now.train_s / 3600 * usd_per_hour:.4f}")
    measures = [f"loss {now.loss:.3f}"]
    if bits_per_byte is not None:
        measures.append(f"{bits_per_byte:.3f} bits/byte")
    speed = len(recent) / sum(1 / step.tokens_per_s for step in recent)
    measures += [f"{speed:,.0f} tok/s", f"busiest expert +{now.max_vio:.0%}"]
    return "  ".join(progress), "  ".join(measures)


def how_far(recent: list[StepMetrics], total_steps: int) -> list[str]:
    """The step, and the time left as soon as it can be told."""
    now, first = recent[-1], recent[0]
    if now.step == first.step:
        return [f"step {now.step:,}/{total_steps:,}"]
    seconds_a_step = (now.train_s - first.train_s) / (now.step - first.step)
    return [f"step {now.step:,}/{total_steps:,}", f"left {duration(seconds_a_step * (total_steps - now.step))}"]


_SCORES = {"eval_loss": "held-out loss {:.3f}", "bits_per_byte": "{:.3f} bits a byte"}


def _scores(values: dict[str, float]) -> str:
    """Pretraining's in words, others by their names; what is only for the report is left out."""
    said = [words.format(values[name]) for name, words in _SCORES.items() if name in values]
    others = values.keys() - _SCORES.keys() - {"mtp_acceptance"}
    return ", ".join([*said, *(f"{name.replace('_', ' ')} {values[name]:.4g}" for name in sorted(others))])


def duration(seconds: float) -> str:
    """12 s, 3 min 5 s, 2 h 10 min, 54 d 5 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = max(0, round(seconds))
    first = next((i for i, (_, size) in enumerate(units) if whole >= size), 3)
    parts = []
    for name, size in units[first : first + 2]:
        count, whole = divmod(whole, size)
        parts += [f"{count} {name}"] if count or not parts else []
    return " ".join(parts)


def _sentence(event: Notice | Started | Saved | Finished, recent: list[StepMetrics], bits: float | None) -> str:
    if isinstance(event, Notice):
        return event.text
    if isinstance(event, Saved):
        return f"step {event.step:,}: saved {event.path.name}"
    if isinstance(event, Started):
        begins = f"goes on after step {event.step:,} of" if event.step else "begins:"
        return (
            f"{event.run_dir}: {begins} {event.total_steps:,} steps, {event.total_tokens:,} tokens;"
            f" {event.parameters:,} parameters; {event.device}, {event.dtype}, {_threads(event.threads)}"
        )
    if event.already:
        return f"{event.run_dir}: finished already, at step {event.step:,}; for more give --set steps=N beyond that"
    took = f" in {duration(recent[-1].train_s)}" if recent else ""
    scored = f"; held-out text {bits:.3f} bits a byte" if bits is not None else ""
    chat = event.run_dir if event.adapts is None else f"{event.adapts} --adapter {event.run_dir}"
    return f"{event.run_dir}: finished {event.step:,} steps{took}{scored}. Now: fireflyer chat {chat}"


def _threads(threads: int) -> str:
    return f"{threads} thread" + ("s" if threads != 1 else "")
