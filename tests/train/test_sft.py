"""Fine-tuning on chats: what is learnt, kept apart, split, stopped and killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chat_runs import base_model, chat, post_training, write_lines
from tiny_run import checkpoint_bytes

from fireflyer.checkpoint.hf import load_model, load_tokenizer
from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.cli.chat import untaught
from fireflyer.cli.main import main
from fireflyer.data.chats import PADDING, packed_rows
from fireflyer.errors import Stopped, UserError
from fireflyer.text.taught import Taught
from fireflyer.train.loop import train
from fireflyer.train.pretraining import without_padding
from fireflyer.train.sft import open_chats

CHATS = [chat("add " * (i % 5 + 1), "it is so " * (i % 3 + 1)) for i in range(20)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "chats.jsonl", CHATS)


def sft(run_dir: Path, base: Path, data: Path, stop: int | None = None, **settings) -> Path:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop

    train(post_training("sft", base, data, **settings), run_dir, opener=open_chats, should_stop=should_stop)
    path = newest_good_checkpoint(run_dir)
    assert path is not None
    return path


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_document_of_a_row_sees_nothing_of_its_neighbours(base: Path) -> None:
    """Nothing at all flows, to the bit; the values differ by rounding, as the experts' rows lie elsewhere."""
    model = load_model(base)
    second = Taught([3, 40, 41, 42, 43], [False, False, True, True, True])
    hidden = []
    for first in ([5, 6, 7, 8], [90, 91, 92, 93]):
        batch = packed_rows([[Taught(first, [True] * 4), second]], 10, pad_id=2)
        embeds = model.embed(batch.input_ids_BT).detach().requires_grad_()
        out = model.trunk(inputs_embeds=embeds, positions=batch.positions_BT, document_ids=batch.document_ids_BT)
        hidden.append(out.hidden_BTD[0, 3:7].detach())
        out.hidden_BTD[0, 3:7].square().sum().backward()
        assert embeds.grad is not None
        assert bool((embeds.grad[0, :3] == 0).all())
        assert bool((embeds.grad[0, 7:] == 0).all())
        assert bool((embeds.grad[0, 3:7] != 0).any())
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-5, atol=1e-5)
    alone = packed_rows([[second]], 4, pad_id=2)
    torch.testing.assert_close(model.trunk(alone.input_ids_BT).hidden_BTD[0].detach(), hidden[0], rtol=1e-5, atol=1e-5)


def test_padding_is_no_load_of_experts(base: Path) -> None:
    model = load_model(base)
    batch = packed_rows([[Taught([5, 6, 7], [True] * 3)], [Taught([5, 6, 7, 8, 9, 10], [True] * 6)]], 6, pad_id=2)
    out = model.trunk(batch.input_ids_BT, positions=batch.positions_BT, document_ids=batch.document_ids_BT)
    kept = without_padding(out.routing, batch.document_ids_BT)
    text = batch.document_ids_BT != PADDING
    for layer in kept:
        assert len(layer.indices_NK) == int(text[:, : layer.shape_BT[1]].sum())
    assert without_padding(out.routing, None) is out.routing


def test_the_loss_falls_and_does_not_depend_on_the_split(base: Path, data: Path, tmp_path: Path) -> None:
    sft(tmp_path / "a", base, data, schedule__lr=3e-3, steps=12)
    sft(tmp_path / "b", base, data, schedule__lr=3e-3, steps=12, parallel__micro_batch_size=1)
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert a[-1] < a[0] - 0.3
    assert a[0] == pytest.approx(b[0], rel=1e-6)
    assert a == pytest.approx(b, rel=1e-3)


def test_stopped_anywhere_it_ends_in_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_every": 2, "data__held_out": 0.2, "schedule__lr": 1e-3}
    whole = checkpoint_bytes(sft(tmp_path / "whole", base, data, **settings))
    for k in (1, 4):
        with pytest.raises(Stopped):
            sft(tmp_path / f"{k}", base, data, stop=k, **settings)
        torch.manual_seed(k)
        assert checkpoint_bytes(sft(tmp_path / f"{k}", base, data, **settings)) == whole
        assert losses(tmp_path / f"{k}") == losses(tmp_path / "whole")
        assert (tmp_path / f"{k}" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_killed_it_ends_in_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    command = ["sft", "--from", str(base), "--data", str(data)]
    for setting in ("steps=40", "batch_size=4", "seq_len=48", "checkpoint_every=2", "eval_every=0", "threads=1"):
        command += ["--set", setting]
    assert main([*command, "--run", str(tmp_path / "whole")]) == 0
    killed = [sys.executable, "-m", "fireflyer", *command, "--run", str(tmp_path / "killed")]
    process = subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*command, "--run", str(tmp_path / "killed")]) == 0
    ends = [newest_good_checkpoint(tmp_path / name) for name in ("whole", "killed")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert checkpoint_bytes(ends[0]) == checkpoint_bytes(ends[1])


def test_the_model_counts_as_taught_and_its_export_too(base: Path, data: Path, tmp_path: Path) -> None:
    sft(tmp_path / "run", base, data, steps=1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    for folder, note in ((base, True), (tmp_path / "run", False), (tmp_path / "out", False)):
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        assert bool(untaught(tokenizer)) is note


def test_wrong_input_leaves_no_folder(base: Path, tmp_path: Path) -> None:
    cases = [
        ([{**CHATS[0], "x": 1}], {}, r"line 1: unknown key 'x'"),
        ([chat("a", "b" * 80)], {}, r"line 1: 8\d tokens, of which a row holds seq_len = 48"),
        (CHATS, {"data__mask_documents": False}, "data.mask_documents = false"),
        (CHATS, {"data__fim_rate": 0.5}, "data.fim_rate = 0.5 is for pretraining"),
        (CHATS[:1], {"eval_every": 1}, "one line is all there is"),
    ]
    for lines, settings, words in cases:
        with pytest.raises(UserError, match=words):
            sft(tmp_path / "run", base, write_lines(tmp_path / "bad.jsonl", lines), **settings)
    assert not (tmp_path / "run").exists()


def test_epochs_are_of_packed_rows(base: Path, data: Path, tmp_path: Path) -> None:
    recipe = post_training("sft", base, data).model_copy(update={"steps": None, "epochs": 2.0})
    inputs = open_chats(recipe, tmp_path / "run", None, lambda event: None)
    rows = inputs.objective(load_model(base)).next_batch(1)
    assert rows.input_ids_BT.shape == (1, 48)
    assert inputs.recipe.tokens is not None
    assert inputs.recipe.tokens % (2 * 48) == 0


def test_the_command_says_what_is_missing(capsys: pytest.CaptureFixture[str], base: Path) -> None:
    assert main(["sft", "--data", "x.jsonl"]) == 2
    assert main(["sft", "--from", str(base), "--set", "seq_len=32"]) == 2
    assert main(["sft", "--from", str(base), "--set", "seq_len=32", "--set", "steps=5", "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "--from CHECKPOINT" in err
    assert "--data FILE.jsonl" in err
