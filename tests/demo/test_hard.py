"""The hard demo at a size of seconds: kinds and lengths apart, a bill that adds up, and that it goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fireflyer.cli.main import main
from fireflyer.data.expressions import ExpressionSource, worked_answer
from fireflyer.demo import examination, hard
from fireflyer.demo.hard import HardSummary, hard_receipt, run_hard
from fireflyer.errors import Stopped
from fireflyer.infer.sampling_params import SamplingParams

TINY = ("steps=4", "batch_size=2", "eval_every=0", "checkpoint_every=2", "model.hidden_size=32")
EACH, LONGER = 6, 4


@pytest.fixture(autouse=True)
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpressionSource, "held_out_of_each", EACH)
    monkeypatch.setattr(hard, "LONGER_OF_EACH", LONGER)


def test_kinds_are_scored_apart_and_longer_numbers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scribe in the model's place knows all of it but longer products, and slips in one difference."""
    asked: list[str] = []

    class Scribe(hard.LLM):
        def generate(self, prompts, sampling_params=None):
            outputs = super().generate(prompts, SamplingParams(max_tokens=2, temperature=0))
            for prompt, output in zip(prompts, outputs, strict=True):
                text = prompt.strip().removesuffix("=")
                asked.append(text)
                result = str(eval("".join(str(int(p)) if p.isdigit() else p for p in _parts(text))))
                slip = "*" in text and text[0] != "0"  # four places, all of them filled
                slip |= text == next((t for t in asked if "-" in t and "*" not in t), None)
                answer = f"working={'1' if slip else ''}{result.zfill(9)}"
                output.outputs[0] = dataclasses.replace(output.outputs[0], text=answer)
            return outputs

    monkeypatch.setattr(hard, "LLM", Scribe)
    s = run_hard(tmp_path / "run", overrides=TINY)
    assert {kind: dataclasses.astuple(score) for kind, score in s.kinds.items()} == {
        "sum": (EACH, EACH, LONGER, LONGER),
        "difference": (EACH - 1, EACH, LONGER, LONGER),
        "product": (EACH, EACH, 0, LONGER),
        "mixed": (EACH, EACH, 0, LONGER),
    }
    assert s.accuracy == (4 * EACH - 1) / (4 * EACH)
    assert s.longer_accuracy == 0.5
    assert (s.held_out, s.longer) == (4 * EACH, 4 * LONGER)
    assert len(asked) == len(set(asked)) == s.held_out + s.longer
    longer = asked[s.held_out :]
    assert all(len(str(int(_parts(text)[0]))) == (4 if "*" in text else 9) for text in longer)
    text = "\n".join(hard_receipt(s, tmp_path / "run"))
    assert "  products                    6 of 6              0 of 4" in text
    assert text.count("wrong") == 3  # one of each kind and length is shown
    assert f"${s.usd:.4f}" in text


def _parts(text: str) -> list[str]:
    return "".join(f" {c} " if c in "+-*" else c for c in text).split()


def test_it_stops_goes_on_and_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run, seen = tmp_path / "run", []
    with pytest.raises(Stopped, match="at step 1 of 4"):
        run_hard(run, overrides=TINY, should_stop=lambda: True)
    monkeypatch.setattr(examination, "SCORED_TOGETHER", 8)
    with pytest.raises(Stopped, match="examination"):
        run_hard(
            run,
            overrides=TINY,
            on_event=seen.append,
            should_stop=lambda: any(isinstance(event, examination.Scoring) for event in seen),
        )
    summary = run_hard(run, overrides=TINY)
    assert isinstance(summary, HardSummary)
    assert summary.usd == pytest.approx(summary.train_s / 3600 * summary.usd_per_hour)
    stored = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert stored["kinds"]["product"]["longer"] == LONGER
    assert stored["step"] == 4
    seen.clear()
    assert run_hard(run, overrides=TINY, on_event=seen.append) == summary
    assert len(seen) == 1


def test_the_longest_working_fits_its_answer() -> None:
    source = ExpressionSource(0)
    assert max(len(source.read(i).text) - source.read(i).loss_from for i in range(64)) < hard._ANSWER_TOKENS
    assert len(worked_answer(hard.held_out_expressions(0, 1, "mixed", longer=True)[0])) < hard._ANSWER_TOKENS


def test_one_demo_at_a_time(tmp_path: Path, capsys) -> None:
    assert main(["demo", "--hard", "--reason", "--run", str(tmp_path / "run")]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
