"""What a run shows of itself, and how it takes Ctrl-C, fed with made-up events."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest

from fireflyer.cli.dry_run import describe, plan
from fireflyer.cli.progress import Progress, duration, status
from fireflyer.cli.signals import StopSignals
from fireflyer.errors import Stopped
from fireflyer.train.events import Evaluated, Finished, Notice, Saved, Started, StepDone, StepMetrics
from fireflyer.train.recipe import load_recipe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, tokens_per_s: float = 100.0, train_s: float | None = None) -> StepMetrics:
    return StepMetrics(
        step=number,
        tokens=number * 100,
        values={"loss": 2.0, "mtp_loss": 2.5, "balance_loss": 1.0},
        lr=1e-3,
        grad_norm=0.5,
        tokens_per_s=tokens_per_s,
        max_vio=0.25,
        batch_size=4,
        epoch=0,
        train_s=2.0 * number if train_s is None else train_s,
        peak_memory_bytes=10**8,
    )


STARTED = Started(Path("run"), 0, 0, 10, 1000, 1234, 1e6, "cpu", "fp32", 1)


def drawn(stream: io.StringIO) -> str:
    with Progress(stream) as progress:
        progress.on_event(Notice("training a tokenizer"))
        progress.on_event(STARTED)
        for number in range(1, 11):
            progress.on_event(StepDone(step(number), 10))
        progress.on_event(Evaluated(10, {"eval_loss": 2.0, "bits_per_byte": 1.5, "mtp_acceptance": 0.5}, 0.1))
        progress.on_event(Saved(10, Path("run/checkpoints/step-00000010"), 0.1))
        progress.on_event(Finished(Path("run"), 10, already=False))
    return stream.getvalue()


def test_a_file_gets_plain_lines_and_not_one_for_every_step() -> None:
    lines = drawn(io.StringIO()).splitlines()
    assert lines[0] == "training a tokenizer"
    assert lines[1] == "run: begins: 10 steps, 1,000 tokens; 1,234 parameters; cpu, fp32, 1 thread"
    assert [line.split()[1] for line in lines if line.startswith("step") and "tok/s" in line] == ["1/10", "10/10"]
    assert "step 10: held-out loss 2.000, 1.500 bits a byte" in lines
    assert lines[-1] == "run: finished 10 steps in 20 s; held-out text 1.500 bits a byte. Now: fireflyer chat run"
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_live_lines_that_are_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = drawn(Terminal())
    assert "step 5/10  left 10 s" in text
    assert "loss 2.000" in text
    # Whatever comes after the last line that stays erases the two live lines below it.
    assert text.rpartition("Now: fireflyer chat run")[2].count("\x1b[2K") >= 2


def test_a_resumed_and_a_finished_run_say_so() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.on_event(Started(Path("run"), 4, 400, 10, 1000, 1234, 1e6, "cpu", "fp32", 2))
        progress.on_event(Finished(Path("run"), 10, already=True))
    first, last = stream.getvalue().splitlines()
    assert "goes on after step 4 of 10 steps" in first
    assert "2 threads" in first
    assert "finished already, at step 10" in last


def test_a_run_of_adapters_names_the_model_to_chat_with() -> None:
    stream = io.StringIO()
    with Progress(stream) as progress:
        progress.on_event(Finished(Path("runs/lora"), 10, already=False, adapts="runs/demo"))
    command = stream.getvalue().strip().rpartition("Now: fireflyer ")[2]
    assert command == "chat runs/demo --adapter runs/lora"


def test_speed_is_the_mean_over_tokens_and_time_left_follows_the_clock() -> None:
    # 100 tokens at 100/s and 100 at 50/s are 200 tokens in 3 s; the steps lie 5 s apart (evaluations between them).
    progress, measures = status([step(1, 100.0, 3.0), step(2, 50.0, 8.0)], 14, None, None)
    assert progress == "step 2/14  left 1 min"
    assert measures == "loss 2.000  67 tok/s  busiest expert +25%"
    # The first step shows no time left; 8 s at 2 dollars an hour are 0.0044 dollars.
    assert status([step(1, train_s=8.0)], 14, 1.25, 2.0) == (
        "step 1/14  $0.0044",
        "loss 2.000  1.250 bits/byte  100 tok/s  busiest expert +25%",
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (7801, "2 h 10 min"), (4_683_600, "54 d 5 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as stop:
        stop.on_event(STARTED)
        assert not stop.requested()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_training_ends_it_at_once() -> None:
    with pytest.raises(Stopped, match="before training began"), StopSignals():
        signal.raise_signal(signal.SIGTERM)


def test_hours_of_other_models_scale_with_their_work() -> None:
    facts = plan(load_recipe("ember", ["tokens=1T"]))
    work = facts["train"]["gflop_per_token"] + facts["train"]["mtp_gflop_per_token"]
    of_v3 = 250.5 + 10.19
    assert facts["train"]["device_hours"] == pytest.approx(180_000 * work / of_v3, rel=1e-3)
    assert "1T tokens in 244,140,625 steps" in describe(facts)
