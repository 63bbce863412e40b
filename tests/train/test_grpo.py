"""GRPO runs: they learn, they go on to the bit, and nothing a grader does ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from tiny_run import SETTINGS, checkpoint_bytes, tiny_recipe

from fireflyer.checkpoint.run import list_checkpoints, newest_good_checkpoint
from fireflyer.checkpoint.run_folder import METRICS, SAMPLES, read_metrics
from fireflyer.errors import Stopped, UserError
from fireflyer.train import events
from fireflyer.train.grpo import GrpoSource
from fireflyer.train.grpo_run import open_grpo
from fireflyer.train.judges import Grade, Problem
from fireflyer.train.loop import train
from fireflyer.train.post_training_settings import GrpoSettings
from fireflyer.train.recipe import load_recipe
from fireflyer.train.rollout import Rollout
from fireflyer.train.settings import Recipe

STEPS = 5
TIMES = {"rollout_s", "scoring_s", "update_s", "rollout_tokens_per_s", "train_s", "tokens_per_s", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model; its answers are noise, of which the first character decides the reward."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(tiny_recipe("builtin:arithmetic", steps=3, checkpoint_every=10, model__max_position_embeddings=64), run)
    return run


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rewards short answers: something noise can learn."""
    path = tmp_path_factory.mktemp("env") / "short.py"
    path.write_text(
        "PROBLEMS = [{'problem': 'say ' + 'a' * i} for i in range(12)]\n"
        "def grade(problem, answer):\n"
        "    return sum(c in 'abcdefghijklm0123456789' for c in answer) / max(len(answer), 1)\n"
    )
    return path


def recipe(checkpoint: Path, environment: Path, **settings: Any) -> Recipe:
    """All that has state: two updates for each set of rollouts, a reference, replayed experts, masked truncation."""
    changed: dict[str, Any] = {
        "steps": STEPS,
        "batch_size": 8,
        "seq_len": 40,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "eval_every": 2,
        "threads": 1,
        "schedule.lr": 1e-2,
        "parallel.micro_batch_size": 4,
        "grpo.environment": json.dumps(str(environment)),
        "grpo.group_size": 4,
        "grpo.updates": 2,
        "grpo.max_answer_tokens": 10,
        "grpo.held_out": 3,
        "grpo.kl_weight": 0.01,
        "grpo.routing_replay": "true",
        "balance.bias_speed": 0.01,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    overrides = [f"{key}={value}" for key, value in changed.items()]
    return load_recipe(None, overrides, init_from=str(checkpoint), base="grpo")


def rows(run: Path, name: str = METRICS) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run, name=name)]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, grader: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    train(recipe(checkpoint, grader), run, opener=open_grpo)
    return run


def test_a_run_tells_what_matters(whole: Path):
    row = read_metrics(whole)[-1]
    assert row.keys() >= TIMES | {"reward", "accuracy", "format_reward", "answer_reward", "length", "kl", "entropy"}
    assert row.keys() >= {"clip_share", "gap", "gap_max", "equal_groups", "truncated", "failed_grades"}
    found = read_metrics(whole)
    # The first update from each set of rollouts is made by the weights that wrote them; the second no longer is.
    assert all(row["gap_max"] < 1e-5 for row in found[::2])
    assert all(row["gap_max"] > 1e-4 for row in found[1::2])
    assert [row["rollout_s"] > 0 for row in found] == [True, False, True, False, True]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert found[-1]["kl"] > 0
    samples = read_metrics(whole, name=SAMPLES)
    assert {sample["step"] for sample in samples} == {1, 3, 5}
    assert all(sample["prompt"].startswith("say") and "reward" in sample for sample in samples)
    assert all(0 <= row["eval_accuracy"] <= 1 for row in found if row["step"] % 2 == 0)


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_a_stopped_run_goes_on_to_the_bit(checkpoint: Path, grader: Path, whole: Path, tmp_path: Path, stop_at: int):
    """Between two updates on the same rollouts too."""
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(
            recipe(checkpoint, grader),
            run,
            opener=open_grpo,
            should_stop=lambda: len(read_metrics(run)) >= stop_at,
        )
    train(recipe(checkpoint, grader), run, opener=open_grpo)
    assert rows(run) == rows(whole)
    assert rows(run, SAMPLES) == rows(whole, SAMPLES)
    mine, theirs = newest_good_checkpoint(run), newest_good_checkpoint(whole)
    assert checkpoint_bytes(mine) == checkpoint_bytes(theirs)


def test_a_killed_run_goes_on_to_the_bit(checkpoint: Path, grader: Path, whole: Path, tmp_path: Path):
    run = tmp_path / "run"
    code = (
        "import sys, pickle\nfrom fireflyer.train.grpo_run import open_grpo\nfrom fireflyer.train.loop import train\n"
        "from fireflyer.train.recipe import read_recipe\nfrom pathlib import Path\n"
        "recipe = read_recipe(Path(sys.argv[1]))\n"
        "train(recipe, sys.argv[2], opener=open_grpo)\n"
    )
    command = [sys.executable, "-c", code, str(whole / "recipe.toml"), str(run)]
    killed = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while len(list_checkpoints(run) if run.exists() else []) < 2 and time.monotonic() < deadline:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    subprocess.run(command, check=True, timeout=120)
    assert rows(run) == rows(whole)
    assert checkpoint_bytes(newest_good_checkpoint(run)) == checkpoint_bytes(newest_good_checkpoint(whole))


def _notices(run_recipe: Recipe, run: Path) -> list[str]:
    told: list[str] = []
    train(
        run_recipe,
        run,
        opener=open_grpo,
        on_event=lambda e: told.append(e.text) if isinstance(e, events.Notice) else None,
    )
    return told


def test_failing_graders_cost_answers_and_not_the_run(checkpoint: Path, tmp_path: Path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import os, time\nPROBLEMS = [{'problem': 'say ' + 'a' * i} for i in range(4)]\n"
        "def grade(problem, answer):\n"
        "    kind = sum(map(ord, answer)) % 4\n"
        "    if kind == 0: time.sleep(100)\n"
        "    if kind == 1: os._exit(1)\n"
        "    return float('nan') if kind == 2 else float(len(answer) % 2)\n"
    )
    run = tmp_path / "run"
    settings = {
        "steps": 2,
        "eval_every": 0,
        "grpo__updates": 1,
        "grpo__grade_timeout_s": 0.3,
        "grpo__answers_at_once": 3,
    }
    told = _notices(recipe(checkpoint, path, **settings), run)
    assert any("grading failed for" in text and "PROBLEMS[" in text for text in told)
    found = read_metrics(run)
    assert len(found) == 2
    assert all(row["failed_grades"] > 0 for row in found)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("1.0", "every answer to every problem is right"),
        ("0.0", "give easier problems"),
        ("0.5", "middling difficulty"),
    ],
)
def test_a_run_with_nothing_to_learn_says_so_and_changes_nothing(
    checkpoint: Path, tmp_path: Path, reward: str, words: str
):
    path = tmp_path / "same.py"
    path.write_text(
        f"PROBLEMS = [{{'problem': 'say a'}}, {{'problem': 'say b'}}]\ndef grade(problem, answer): return {reward}\n"
    )
    run = tmp_path / "run"
    settings = {"steps": 2, "eval_every": 0, "grpo__format_weight": 0, "grpo__kl_weight": 0, "grpo__updates": 1}
    if reward == "0.5":
        path.write_text(path.read_text() + "def grade(problem, answer): return float(problem['problem'] == 'say a')\n")
    told = _notices(recipe(checkpoint, path, balance__bias_speed=0, **settings), run)
    assert sum(words in text for text in told) == 1
    for row in read_metrics(run):
        assert row["equal_groups"] == 1
        assert row["loss"] == row["grad_norm"] == 0
    before, after = newest_good_checkpoint(checkpoint), newest_good_checkpoint(run)
    assert checkpoint_bytes(before)["model.safetensors"] == checkpoint_bytes(after)["model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"grpo__group_size": 1}, "grpo.group_size = 1"),
        (
            {"batch_size": 10, "grpo__updates": 1, "parallel__micro_batch_size": 0},
            "grpo.group_size = 4 does not divide",
        ),
        ({"seq_len": 20}, "PROBLEMS[4]: the prompt has"),
        ({"grpo__max_answer_tokens": 40}, "leaves no room for a prompt"),
        ({"grpo__held_out": 12}, "none is left to train on"),
        ({"mtp__weight": 0.3}, "mtp.weight = 0.3: GRPO has no such loss"),
        ({"dpo__beta": 0.1}, "the recipe has [dpo]"),
        ({"grpo__clip_lo": 0.1}, "did you mean grpo.clip_low?"),
    ],
)
def test_what_is_wrong_is_told_before_the_run(
    checkpoint: Path, grader: Path, tmp_path: Path, settings: dict[str, Any], words: str
):
    with pytest.raises(UserError) as refused:
        train(recipe(checkpoint, grader, **settings), tmp_path / "run", opener=open_grpo)
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_problems_without_end_that_are_too_long_are_passed_over():
    class Lengthening:
        name, num_problems = "lengthening", None

        def fingerprint(self) -> str:
            return ""

        def problem(self, index: int) -> Problem:
            return Problem("a" * (200 if index % 3 else 5), index, f"problem {index}")

        def grade(self, problems: Any, answers: Any) -> Any:
            return [Grade(1.0, True) for _ in answers]

        def close(self) -> None:
            pass

    class Prompts:
        def encode(self, text: str, where: str) -> tuple[str, list[int]]:
            if len(text) > 100:
                raise UserError(where)
            return text, [1]

    class Answers:
        def answer(self, prompts: Any, seeds: Any, *, group_size: int, max_tokens: int) -> Any:
            return [[Rollout([3], [-1.0], "a", True, None)] * group_size for _ in prompts]

    source: Any = GrpoSource(
        GrpoSettings(group_size=2),
        cast(Any, Answers()),
        Lengthening(),
        cast(Any, Prompts()),
        seed=0,
        pad_id=2,
        held_out=0,
        on_samples=lambda samples: None,
        on_notice=lambda text: None,
    )
    assert source.next_batch(6).num_rows == 6
    assert source.state_dict()["drawn"] == 7  # problems 0, 3 and 6


def test_other_runs_refuse_the_table(tmp_path: Path):
    assert SETTINGS
    with pytest.raises(UserError, match=r"the recipe has \[grpo\]"):
        train(tiny_recipe("builtin:arithmetic", grpo__group_size=4), tmp_path / "run")
