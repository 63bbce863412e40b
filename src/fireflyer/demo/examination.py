"""What the demos share after training: held-out problems answered in turn, and keys added to a run's summary.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import SUMMARY
from fireflyer.demo.bill import Bill
from fireflyer.errors import Stopped
from fireflyer.infer.llm import LLM
from fireflyer.infer.request import RequestOutput
from fireflyer.infer.sampling_params import SamplingParams

SCORED_TOGETHER = 125


@dataclass(frozen=True)
class Scoring:
    """Held-out problems are being answered: `done` of `total`."""

    done: int
    total: int
    correct: int


@dataclass(frozen=True)
class Question:
    """A prompt, and whether what the model goes on with is right."""

    prompt: str
    is_right: Callable[[str], bool]


def examine(
    llm: LLM,
    questions: Sequence[Question],
    max_tokens: int,
    on_event: Callable[[Scoring], None],
    should_stop: Callable[[], bool],
) -> tuple[list[RequestOutput], list[bool]]:
    """The greedy answers, and which are right. Raises Stopped where `should_stop` says so."""
    outputs: list[RequestOutput] = []
    right: list[bool] = []
    for start in range(0, len(questions), SCORED_TOGETHER):
        if should_stop():
            raise Stopped("stopped during the examination; the training is saved, the same command examines again")
        part = questions[start : start + SCORED_TOGETHER]
        params = SamplingParams(max_tokens=max_tokens, temperature=0)
        answers = llm.generate([question.prompt for question in part], params)
        outputs += answers
        right += [q.is_right(answer.outputs[0].text) for q, answer in zip(part, answers, strict=True)]
        on_event(Scoring(len(outputs), len(questions), sum(right)))
    return outputs, right


def summarised(run_dir: Path, kind: type[Bill], make: Callable[[], Bill]) -> dict[str, Any]:
    """A demo's keys of a finished run's summary.json: as they stand there, or what `make` finds, added to it."""
    path, keys = run_dir / SUMMARY, [field.name for field in fields(kind)]
    stored = json.loads(path.read_text(encoding="utf-8"))
    if any(key not in stored for key in keys):
        stored |= asdict(make())
        write_text(path, json.dumps(stored, indent=2) + "\n")
    return {key: stored[key] for key in keys}
