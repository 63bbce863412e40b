"""The verbs of post-training on the command line: what a newcomer gets wrong, and a distillation from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fireflyer.cli.main import main

SMALL = ["--set", "seq_len=48", "--set", "distill.max_answer_tokens=8", "--set", "threads=1"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whatever is answered is right."""
    path = tmp_path_factory.mktemp("env") / "any.py"
    path.write_text(
        "PROBLEMS = [{'problem': 'fox ' * (i % 3 + 1)} for i in range(8)]\ndef grade(problem, answer): return 1.0\n"
    )
    return path


@pytest.fixture(scope="module")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "int8"
    assert main(["convert", str(tiny_checkpoint), str(folder), "--to", "int8"]) == 0
    return folder


def test_packed_weights_are_not_trained(packed: Path, problems: Path, tmp_path: Path, capsys) -> None:
    """Every verb that trains says so in one line and writes nothing; as a teacher they do."""
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text('{"prompt": "fox", "completion": "dog"}\n' * 3)
    pairs.write_text('{"prompt": "fox", "chosen": "dog", "rejected": "cat"}\n' * 3)
    run = tmp_path / "run"
    for words in (
        ["pretrain", "--from", str(packed), "--data", "builtin:arithmetic", "--set", "steps=2"],
        ["sft", "--from", str(packed), "--data", str(chats)],
        ["sft", "--from", str(packed), "--data", str(chats), "--set", "lora.rank=2"],
        ["dpo", "--from", str(packed), "--data", str(pairs)],
        ["grpo", "--from", str(packed), "--env", str(problems), "--set", "grpo.max_answer_tokens=8"],
        ["distill", str(packed), str(packed), "--env", str(problems), "--set", "distill.max_answer_tokens=8"],
    ):
        assert main([*words, "--run", str(run), "--set", "seq_len=48"]) == 2, words
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "packed as integers" in said, said
        assert not run.exists()


def test_a_packed_teacher_and_one_object_on_stdout(
    packed: Path, tiny_checkpoint: Path, problems: Path, tmp_path: Path, capsys
) -> None:
    """An untrained teacher's answers are noise that hardly ever ends; those that do are learnt."""
    words = ["distill", str(packed), str(tiny_checkpoint), "--env", str(problems), "--run", str(tmp_path / "run")]
    words += [*SMALL, "--set", "distill.samples=24", "--set", "distill.held_out=2", "--set", "batch_size=1", "--json"]
    words += ["--set", "distill.temperature=1.0", "--set", "distill.top_p=1.0", "--set", "mtp.weight=0"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["distill"]["problems"] == 6
    assert told["distill"]["answers"] == 144
    assert told["distill"]["kept"] == len((tmp_path / "run" / "kept.jsonl").read_text().splitlines()) > 0
    assert "asked 6 of 6 problems" in err
    assert "dropped:" in err
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == told
    assert "finished already" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: TEACHER, STUDENT"),
        (["{tiny}"], "required: STUDENT"),
        (["{tiny}", "nowhere"], "nowhere: no such folder; fireflyer distill TEACHER STUDENT"),
        (["{tiny}", "{tiny}"], "no environment: give --env"),
        (["{tiny}", "{tiny}", "--env", "chain_sun"], "--env chain_sun"),
        (["{tiny}", "{tiny}", "--envi", "x"], "did you mean --env?"),
        (["{tiny}", "{tiny}", "--env", "{env}", "--set", "distill.keeps=2"], "did you mean distill.keep?"),
        (["{tiny}", "{tiny}", "--env", "{env}", "--set", "seq_len=60000"], "= 50000; set 50000 at most"),
    ],
)
def test_what_a_newcomer_gets_wrong(
    words: list[str], said: str, tiny_checkpoint: Path, problems: Path, tmp_path: Path, capsys
) -> None:
    given = [word.format(tiny=tiny_checkpoint, env=problems) for word in words]
    assert main(["distill", "--run", str(tmp_path / "run"), *SMALL, *given]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_what_the_teacher_writes(tiny_checkpoint: Path, capsys) -> None:
    words = ["distill", str(tiny_checkpoint), str(tiny_checkpoint), *SMALL, "--dry-run"]
    assert main(words) == 0
    assert "1,000 problems 4 times each: 32,000 tokens at most" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["distill"]["samples"] == 4
