"""Distillation: what is kept, as which tokens, that both stages go on to the bit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_runs import base_model, chat, post_training, write_lines
from safetensors.torch import save_file
from tiny_run import checkpoint_bytes, read_tensors, tiny_recipe, write_text

from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.checkpoint.run_folder import read_metrics
from fireflyer.errors import Stopped, UserError
from fireflyer.text.taught import taught_chat
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train import events
from fireflyer.train.distill import KEPT, TEACHER, distill
from fireflyer.train.lessons import Counts, Lessons
from fireflyer.train.loop import train
from fireflyer.train.post_training_settings import DistillSettings
from fireflyer.train.prompts import prompt_form
from fireflyer.train.recipe import load_recipe
from fireflyer.train.settings import Recipe
from fireflyer.train.sft import open_chats
from fireflyer.train.teacher import ANSWERS, Answer, Asked, Gathered

SAID = ["a", "b", "c", "d", "e", "f", "g", "hhhh"]
PROBLEMS = 14
HELD_OUT = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def teacher(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It answers with one of eight letters, mostly; the last one repeated so often that it is cut off."""
    folder = tmp_path_factory.mktemp("teacher")
    chats = [chat(f"say {'o' * (i % 4)}", SAID[i * 5 % 8]) for i in range(64)]
    recipe = post_training(
        "sft", base, write_lines(folder / "chats.jsonl", chats), steps=40, schedule__lr=1e-2, checkpoint_every=99
    )
    train(recipe, folder / "run", opener=open_chats)
    return folder / "run"


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first half of the alphabet is right, and the nearer to its beginning, the more it is worth."""
    path = tmp_path_factory.mktemp("env") / "letters.py"
    path.write_text(
        f"PROBLEMS = [{{'problem': 'say ' + 'o' * i}} for i in range({PROBLEMS})]\n"
        "REWARD_RANGE = (0, 5)\n"
        "def grade(problem, answer):\n"
        "    if answer == 'g': raise ValueError\n"
        "    return max(0.0, 5.0 - 'abcd'.find(answer)) if answer and answer in 'abcd' else 0.0\n"
    )
    return path


def recipe(teacher: Path, student: Path, problems: Path | str, **settings: Any) -> Recipe:
    changed: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 2,
        "seq_len": 48,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "eval_every": 2,
        "threads": 1,
        "schedule.lr": 1e-2,
        "distill.teacher": str(teacher),
        "distill.environment": str(problems),
        "distill.samples": 6,
        "distill.keep": 2,
        "distill.min_reward": 2.0,
        "distill.temperature": 1.0,
        "distill.top_p": 1.0,
        "distill.max_answer_tokens": 3,
        "distill.answers_at_once": 24,
        "distill.held_out": HELD_OUT,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    overrides = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    return load_recipe(None, overrides, init_from=str(student), base="distill")


@pytest.fixture(scope="module")
def whole(teacher: Path, base: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Counts]:
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, distill(recipe(teacher, base, problems), run)[1]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_run(run: Path, whole: Path) -> None:
    assert (run / ANSWERS).read_bytes() == (whole / ANSWERS).read_bytes()
    assert (run / KEPT).read_bytes() == (whole / KEPT).read_bytes()
    mine, theirs = newest_good_checkpoint(run), newest_good_checkpoint(whole)
    assert mine is not None
    assert theirs is not None
    assert checkpoint_bytes(mine) == checkpoint_bytes(theirs)


def test_the_best_right_answers_are_kept_and_the_rest_is_counted(whole: tuple[Path, Counts], base: Path) -> None:
    """Against a naive reading of all that the teacher wrote."""
    run, counts = whole
    tokenizer = Tokenizer.from_file(base)
    asked = rows(run / ANSWERS)
    assert sorted(row["number"] for row in asked) == list(range(HELD_OUT, PROBLEMS))
    expected, seen = [], {"cut_off": 0, "not_graded": 0, "wrong": 0, "duplicate": 0, "surplus": 0}
    for row in asked:
        letters = []
        for answer in row["answers"]:
            text = answer["text"]
            if answer["verdict"] == "right":
                assert answer["token_ids"] == [*tokenizer.encode(text), tokenizer.eos_id]
                assert answer["reward"] == 5 - "abcd".index(text)
                seen["duplicate"] += text in letters
                letters += [] if text in letters else [text]
            else:
                assert answer["token_ids"] is None
                seen[answer["verdict"]] += 1
                assert answer["verdict"] != "not_graded" or text == "g"
        seen["surplus"] += max(0, len(letters) - 2)
        expected += [(row["problem"], letter) for letter in sorted(letters)[:2]]
    assert [(line["problem"], line["answer"]) for line in rows(run / KEPT)] == expected
    # A duplicate of what is more than `keep` is counted as that.
    assert counts.dropped["duplicate"] + counts.dropped["surplus"] == seen["duplicate"] + seen["surplus"]
    assert {name: counts.dropped[name] for name in ("cut_off", "not_graded", "wrong")} == {
        name: seen[name] for name in ("cut_off", "not_graded", "wrong")
    }
    assert min(seen.values()) > 0
    assert counts.kept == len(expected) > 0
    assert counts.answers == 6 * (PROBLEMS - HELD_OUT) == counts.kept + sum(counts.dropped.values())
    stored = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert stored["distill"]["kept"] == counts.kept
    assert f"kept {counts.kept} of 60 answers" in str(counts)
    found = read_metrics(run)
    assert [row["step"] for row in found if "eval_accuracy" in row] == [
        s for s in range(1, len(found) + 1) if s % 2 == 0 or s == len(found)
    ]


def test_the_student_learns_what_was_kept(whole: tuple[Path, Counts]) -> None:
    run, _ = whole
    losses = [row["loss"] for row in read_metrics(run)]
    assert losses[-1] < 0.7 * losses[0]
    assert Tokenizer.from_file(run).taught_chat


def test_a_stop_in_either_stage_costs_nothing(
    teacher: Path, base: Path, problems: Path, whole: tuple[Path, Counts], tmp_path: Path
) -> None:
    seen: list[Any] = []
    run, told = tmp_path / "run", recipe(teacher, base, problems)

    def chunks() -> int:
        return sum(isinstance(event, Gathered) for event in seen)

    with pytest.raises(Stopped, match="stopped after 4 of 10 problems"):
        distill(told, run, on_event=seen.append, should_stop=lambda: chunks() == 2)
    with pytest.raises(Stopped, match="at step 3 of"):
        distill(told, run, on_event=seen.append, should_stop=lambda: len(read_metrics(run)) == 3)
    assert [event.problems for event in seen if isinstance(event, Gathered)] == [0, 4, 4, 8, 10]
    summary, counts = distill(told, run)
    same_run(run, whole[0])
    assert counts == whole[1]
    assert distill(told, run) == (summary, counts)  # only read
    # A process that ended between the run's summary and the counts has them added.
    (run / "summary.json").write_text(json.dumps(vars(summary)), encoding="utf-8")
    assert distill(told, run) == (summary, counts)


def test_killed_in_both_stages_it_ends_in_the_same_bits(
    teacher: Path, base: Path, problems: Path, whole: tuple[Path, Counts], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code = (
        "import sys\nfrom pathlib import Path\nfrom fireflyer.train.distill import distill\n"
        "from fireflyer.train.recipe import read_recipe\ndistill(read_recipe(Path(sys.argv[1])), sys.argv[2])\n"
    )
    for file in (ANSWERS, "metrics.jsonl"):
        killed = subprocess.Popen([sys.executable, "-c", code, str(whole[0] / "recipe.toml"), str(run)])
        deadline = time.monotonic() + 60
        while not ((run / file).exists() and (run / file).stat().st_size) and time.monotonic() < deadline:
            assert killed.poll() is None
            time.sleep(0.002)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        if file == ANSWERS:  # as a kill leaves it in the middle of the second chunk, and of a line
            lines = (whole[0] / ANSWERS).read_bytes().splitlines(keepends=True)
            (run / ANSWERS).write_bytes(b"".join(lines[:6]) + lines[6][:20])
    distill(recipe(teacher, base, problems), run)
    same_run(run, whole[0])


def _asked(*answers: Answer) -> list[Asked]:
    return [Asked(7, "say o", list(answers))]


def test_why_an_answer_is_dropped_and_which_tokens_are_taught(base: Path) -> None:
    tokenizer = Tokenizer.from_file(base)
    settings = DistillSettings(keep=2, max_answer_tokens=3)
    lessons = Lessons(settings, tokenizer, prompt_form(settings, tokenizer, 30), 30)
    end = tokenizer.eos_id
    kept, counts = lessons.choose(
        _asked(
            Answer("a", 0.5, "right", "", [70, 71, end]),  # ids that `a` alone would not be encoded as
            Answer("b", 1.0, "right", "", [72, end + 1]),  # another end token of the teacher's
            Answer("b", 1.0, "right", "", [73, end]),
            Answer("c", 0.4, "right", "", [74, end]),
            Answer("d", 0.0, "wrong", "", None),
            Answer("e" * 9, 0.0, "cut_off", "", None),
            Answer("f", 0.0, "not_graded", "it hung", None),
        )
    )
    prompt = tokenizer.encode_chat([{"role": "user", "content": "say o"}])
    assert [lesson.taught.token_ids for lesson in kept] == [[*prompt, 72, end], [*prompt, 70, 71, end]]
    assert [sum(lesson.taught.trained) for lesson in kept] == [2, 3]
    assert not any(kept[0].taught.trained[: len(prompt)])
    assert counts.dropped == dict.fromkeys(("wrong", "cut_off", "not_graded", "duplicate", "surplus"), 1) | {
        "too_long": 0
    }
    _, counts = lessons.choose(_asked(Answer("a" * 40, 1.0, "right", "", None)))
    assert counts.dropped["too_long"] == 1
    assert counts.kept == 0


def test_another_tokenizer_gets_texts(teacher: Path, problems: Path, tmp_path: Path) -> None:
    """Thinking finds its place in the student's template."""
    student = tmp_path / "student"
    text = write_text(tmp_path / "text.jsonl", 60, seed=5)
    train(tiny_recipe(text, steps=3, seq_len=64, model__vocab_size=310), student)
    told: list[str] = []
    run = tmp_path / "run"
    settings = {"epochs": 1, "eval_every": 0}
    distill(
        recipe(teacher, student, problems, **settings),
        run,
        on_event=lambda e: told.append(e.text) if isinstance(e, events.Notice) else None,
    )
    assert any("answers are learnt as texts" in line for line in told)
    assert json.loads((run / TEACHER).read_text())["shares_ids"] is False
    assert all(answer["token_ids"] is None for row in rows(run / ANSWERS) for answer in row["answers"])
    tokenizer = Tokenizer.from_file(student)
    options = DistillSettings(max_answer_tokens=9)
    lessons = Lessons(options, tokenizer, prompt_form(options, tokenizer, 60), 60)
    ((lesson,), _) = lessons.choose(_asked(Answer("<think>why</think>a", 1.0, "right", "", None)))
    said = {"role": "assistant", "reasoning_content": "why", "content": "a"}
    assert [lesson.taught] == taught_chat(tokenizer, [{"role": "user", "content": "say o"}, said])
    raw = Lessons(options.model_copy(update={"prompt": "raw"}), tokenizer, prompt_form(options, tokenizer, 60), 60)
    ((lesson,), _) = raw.choose(_asked(Answer("a", 1.0, "right", "", None)))
    ids = lesson.taught.token_ids
    assert tokenizer.decode(ids) == "say oa"
    assert ids[-1] == tokenizer.eos_id


def test_nothing_kept_says_what_to_change(teacher: Path, base: Path, problems: Path, tmp_path: Path) -> None:
    told = recipe(teacher, base, problems, distill__min_reward=6.0, distill__problems=3)
    for _ in range(2):
        with pytest.raises(UserError, match=r"nothing to learn: kept 0 of 18 answers.*give easier problems"):
            distill(told, tmp_path / "run")
    short = recipe(teacher, base, problems, distill__max_answer_tokens=1, distill__problems=3)
    with pytest.raises(UserError, match=r"raise distill\.max_answer_tokens"):
        distill(short, tmp_path / "short")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distill__teacher": ""}, "no teacher"),
        ({"distill__teacher": "/nowhere"}, "/nowhere: no such folder"),
        ({"distill__temperature": 0.0}, "they would all be alike"),
        ({"distill__keep": 7}, "distill.keep = 7 is more than distill.samples = 6"),
        ({"distill__held_out": PROBLEMS}, "distill.held_out = 14"),
        ({"distill__options": ["a=1"]}, "distill.options"),
        ({"distill__max_answer_tokens": 48}, "leaves no room for a prompt"),
        ({"seq_len": 20}, "the prompt has"),
        ({"data__sources": ["x.jsonl"]}, "leave data.sources"),
        ({"lora__rank": 2}, "--set eval_every=0"),
        ({"grpo__group_size": 4}, "the recipe has [grpo]"),
        ({"distill__sample": 4}, "did you mean distill.samples?"),
    ],
)
def test_what_is_wrong_is_told_before_the_run(
    teacher: Path, base: Path, problems: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as refused:
        distill(recipe(teacher, base, problems, **settings), tmp_path / "run")
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_it_is_the_work_of_one_process(
    teacher: Path, base: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process"):
        distill(recipe(teacher, base, problems), tmp_path / "run")


def test_what_changed_meanwhile_is_refused(teacher: Path, base: Path, problems: Path, tmp_path: Path) -> None:
    own, file = tmp_path / "teacher", tmp_path / "letters.py"
    shutil.copytree(newest_good_checkpoint(teacher), own)
    shutil.copy(problems, file)
    told, seen = recipe(own, base, file), []
    with pytest.raises(Stopped):
        distill(told, tmp_path / "run", on_event=seen.append, should_stop=lambda: len(seen) == 2)
    weights = read_tensors(own / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    save_file(weights | {name: weights[name] + 1}, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="the teacher changed since"):
        distill(told, tmp_path / "run")
    save_file(weights, own / "model.safetensors", {"format": "pt"})
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UserError, match="its problems changed since"):
        distill(told, tmp_path / "run")


def test_a_model_may_learn_from_its_own_right_answers(teacher: Path, problems: Path, tmp_path: Path) -> None:
    told: list[str] = []
    settings = {"epochs": 1, "eval_every": 0, "distill__problems": 4, "lora__rank": 2}
    distill(
        recipe(teacher, teacher, problems, **settings),
        tmp_path / "run",
        on_event=lambda e: told.append(e.text) if isinstance(e, events.Notice) else None,
    )
    assert "it learns from its own right answers" in told[0]
    assert (newest_good_checkpoint(tmp_path / "run") / "adapter_config.json").is_file()
