"""The memory of a recipe's run: what is measured of a short one, and the refusal with what would fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fireflyer.errors import UserError
from fireflyer.train.loop import train
from fireflyer.train.memory import check_memory, run_memory
from fireflyer.train.recipe import load_recipe

RUN = [
    "steps=3", "batch_size=48", "seq_len=128", "eval_every=0", "checkpoint_every=2", "model.vocab_size=275",
    "schedule.warmup_steps=1", "threads=1",
]  # fmt: skip


@pytest.mark.parametrize("more", [[], ["parallel.micro_batch_size=16", "ema.decay=0.9"]], ids=["at once", "in parts"])
def test_the_estimate_is_near_the_peak_of_a_run(tmp_path: Path, more: list[str]) -> None:
    """Within 20 %, in a process of its own; what training a tokenizer takes is below it."""
    words = [word for setting in (*RUN, *more) for word in ("--set", setting)]
    command = [sys.executable, "-m", "fireflyer", "pretrain", "--size", "3M", "--data", "builtin:arithmetic"]
    subprocess.run([*command, "--run", str(tmp_path / "run"), *words], check=True, capture_output=True)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    recipe = load_recipe(size="3M", overrides=[*RUN, *more])
    assert run_memory(recipe).total == pytest.approx(last["peak_memory_bytes"], rel=0.2)


def test_what_cant_fit_is_refused_with_what_would() -> None:
    recipe = load_recipe(size="40M", overrides=["steps=10", "batch_size=96"])
    needed = run_memory(recipe).total
    check_memory(recipe, needed)
    with pytest.raises(UserError, match=r"are free: --set parallel\.micro_batch_size=48 fits, with the same result"):
        check_memory(recipe, needed - 1)
    with pytest.raises(UserError, match=r"give a smaller model or seq_len, --set parallel\.recompute=true"):
        check_memory(recipe, 2**28)


def test_a_run_that_cant_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fireflyer.train.setup.free_bytes", lambda device: 2**28)
    recipe = load_recipe(size="3M", overrides=[*RUN, "device=cpu"], sources=["builtin:arithmetic"])
    with pytest.raises(UserError, match=r"MiB of memory and .* are free: --set parallel\.micro_batch_size="):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
