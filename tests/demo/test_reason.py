"""The reasoning demo in small: both stages, what it writes, and that it goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import tiny_recipe

from fireflyer.demo import reason
from fireflyer.demo.reason import COLD_START, GRPO, run_reason
from fireflyer.demo.reason_report import curve_svg, reason_lines
from fireflyer.errors import Stopped, UserError
from fireflyer.train import events
from fireflyer.train.loop import train

SMALL = [
    "steps=2",
    "batch_size=8",
    "grpo.group_size=4",
    "eval_every=1",
    "threads=1",
    "checkpoint_every=1",
    "grpo.max_answer_tokens=6",
]

COLD = ["steps=2", "batch_size=4", "threads=1"]


@pytest.fixture(autouse=True)
def few_problems(monkeypatch: pytest.MonkeyPatch):
    for name, count in (
        ("_EXAMPLES", 40),
        ("_PROBLEMS", 20),
        ("_EXAMINED", 10),
        ("_WATCHED", 4),
        ("_TRIES", 2),
        ("_ANSWER_TOKENS", 6),
    ):
        monkeypatch.setattr(reason, name, count)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("demo") / "demo"
    shape = {"model__max_position_embeddings": 512, "model__num_nextn_predict_layers": 1}
    train(tiny_recipe("builtin:arithmetic", steps=3, checkpoint_every=10, **shape), run)
    return run


def test_it_stops_goes_on_and_is_read_again(demo: Path, tmp_path: Path):
    folder, seen = tmp_path / "demo-reason", []
    with pytest.raises(Stopped):
        run_reason(
            folder,
            demo,
            cold_overrides=COLD,
            overrides=SMALL,
            should_stop=lambda: (folder / GRPO / "metrics.jsonl").exists(),
        )
    summary = run_reason(folder, demo, cold_overrides=COLD, overrides=SMALL, on_event=seen.append)
    assert any(isinstance(event, events.Finished) and event.already for event in seen)  # the cold start
    assert any(isinstance(event, events.Started) and event.step == 1 for event in seen)  # GRPO
    assert summary.steps == 2
    assert summary.answers == 16
    assert summary.held_out == 10
    assert summary.gained == summary.accuracy - summary.cold_start.accuracy
    assert 0 <= summary.cold_start.pass_at_1 <= summary.cold_start.pass_at_8 <= 1
    assert [example["stage"] for example in summary.examples] == ["before", "cold_start", "grpo"]
    assert [point["step"] for point in summary.curve] == [1, 2]
    assert all("eval_accuracy" in point for point in summary.curve)
    seen.clear()
    assert run_reason(folder, demo, cold_overrides=COLD, overrides=SMALL, on_event=seen.append) == summary
    assert seen == []
    lines = reason_lines(summary, folder)
    assert lines[0].startswith(f"{summary.accuracy:.1%} of 10 harder problems")
    assert sum("pass@8" in line for line in lines) == 1
    svg = curve_svg(summary)
    assert svg.count("<polyline") == 2
    assert svg.count("<circle") == 2
    assert (folder / COLD_START / "summary.json").is_file()


def test_another_folder_is_refused(demo: Path, tmp_path: Path):
    (tmp_path / "summary.json").write_text(json.dumps({"accuracy": 1}))
    with pytest.raises(UserError, match="not a reasoning demo's"):
        run_reason(tmp_path, demo)
