"""A run that was stopped or killed, wherever and however often, against one that never was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import SETTINGS, checkpoint_bytes, read_tensors, tiny_recipe, write_text

from benchmarks.resume import finish, kill_again_and_again, outcome
from fireflyer.checkpoint.run import list_checkpoints, newest_good_checkpoint
from fireflyer.data.loader import Loader
from fireflyer.errors import Stopped, UserError
from fireflyer.train import events
from fireflyer.train.loop import train
from fireflyer.train.settings import Recipe

STEPS = 7


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources, one so small that it begins again within the run."""
    folder = tmp_path_factory.mktemp("data")
    large, small = write_text(folder / "large.jsonl", 80, seed=1), write_text(folder / "small.jsonl", 2, seed=2)
    return [f"{large}:2", f"{small}:1"]


def everything(texts: list[str], **settings) -> Recipe:
    """All that has state: average, batch ramp, masks, FIM, micro-batches, gate biases, evaluation."""
    return tiny_recipe(
        *texts,
        **{
            "steps": STEPS,
            "checkpoint_every": 3,
            "eval_every": 2,
            "ema__decay": 0.8,
            "schedule__batch_start": 2,
            "schedule__batch_ramp_tokens": 300,
            "schedule__batch_multiple": 2,
            "parallel__micro_batch_size": 2,
            "data__mask_documents": True,
            "balance__bias_speed": 0.01,
            "balance__bias_until": "70%",
            **settings,
        },
    )


def logged(monkeypatch: pytest.MonkeyPatch) -> list[list]:
    """Every batch that training takes, from now on: the log of what was read."""
    log: list[list] = []
    real = Loader.next_batch

    def next_batch(self: Loader, batch_size: int):
        batch = real(self, batch_size)
        log.append([batch.input_ids_BT.tolist(), batch.labels_BT.tolist(), batch.document_ids_BT.tolist()])
        return batch

    monkeypatch.setattr(Loader, "next_batch", next_batch)
    return log


def stop_after(steps: int) -> Callable[[], bool]:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return should_stop


def final(run_dir: Path) -> Path:
    path = newest_good_checkpoint(run_dir)
    assert path is not None
    return path


def deterministic_metrics(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "train_s", "peak_memory_bytes")} for row in rows]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_split_anywhere_and_twice_equals_the_whole(
    optimizer: str, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped after step k, again one step on, then to the end: weights, moments, average, RNG, batches, metrics."""
    recipe = everything(texts, optimizer__name=optimizer)
    log = logged(monkeypatch)
    train(recipe, tmp_path / "whole")
    whole_log = list(log)
    assert len(whole_log) == STEPS
    assert len(whole_log[0][0]) < len(whole_log[-1][0])  # the batch grew
    assert max(row["epoch"] for row in deterministic_metrics(tmp_path / "whole")) > 0
    for k in range(1, STEPS - 1):
        log.clear()
        run_dir = tmp_path / f"split-{k}"
        for stop in (stop_after(k), stop_after(1)):
            torch.manual_seed(k)  # another process has another RNG
            with pytest.raises(Stopped):
                train(recipe, run_dir, should_stop=stop)
        if k + 1 < STEPS:
            train(recipe, run_dir)
        assert log == whole_log
        assert checkpoint_bytes(final(run_dir)) == checkpoint_bytes(final(tmp_path / "whole"))
        assert deterministic_metrics(run_dir) == deterministic_metrics(tmp_path / "whole")


def test_tied_embeddings_without_query_latent_resume(texts: list[str], tmp_path: Path):
    """One tensor for embedding and head: stored once (and in the MTP's copies), restored as one."""
    recipe = everything(texts, model__tie_word_embeddings=True, model__q_lora_rank=0)
    train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", should_stop=stop_after(3))
    train(recipe, tmp_path / "run")
    assert checkpoint_bytes(final(tmp_path / "run")) == checkpoint_bytes(final(tmp_path / "whole"))
    tensors = read_tensors(final(tmp_path / "run") / "model.safetensors")
    assert "lm_head.weight" not in tensors
    moments = read_tensors(final(tmp_path / "run") / "trainer.safetensors")
    assert moments["optimizer.model.embed_tokens.weight.exp_avg"].shape == tensors["model.embed_tokens.weight"].shape


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bit(texts: list[str], tmp_path: Path):
    recipe = everything(texts, keep_checkpoints=2)
    train(recipe, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", should_stop=stop_after(5))
    newest = final(tmp_path / "run")
    assert newest.name == "step-00000005"
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    told: list[events.Event] = []
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", on_event=told.append, should_stop=stop_after(1))
    # The damaged one is gone: it would take the place of a good one among those that are kept.
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000003"]
    train(recipe, tmp_path / "run")
    started = next(event for event in told if isinstance(event, events.Started))
    assert started.step == 3
    assert any("passed over a damaged" in e.text and "00000005" in e.text for e in told if isinstance(e, events.Notice))
    assert checkpoint_bytes(final(tmp_path / "run")) == checkpoint_bytes(final(tmp_path / "whole"))
    assert deterministic_metrics(tmp_path / "run") == deterministic_metrics(tmp_path / "whole")


def test_no_whole_checkpoint_is_refused_rather_than_begun_anew(texts: list[str], tmp_path: Path):
    recipe = everything(texts)
    with pytest.raises(Stopped):
        train(recipe, tmp_path / "run", should_stop=stop_after(4))
    for path in list_checkpoints(tmp_path / "run"):
        (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        train(recipe, tmp_path / "run")
    assert len(list_checkpoints(tmp_path / "run")) == 2


def test_changed_data_is_refused(tmp_path: Path):
    data = write_text(tmp_path / "text.jsonl", 60)
    with pytest.raises(Stopped):
        train(tiny_recipe(data), tmp_path / "run", should_stop=stop_after(2))
    write_text(data, 60, seed=9)
    with pytest.raises(UserError, match=r"text\.jsonl: the text changed since this run was saved"):
        train(tiny_recipe(data), tmp_path / "run")


def test_killed_again_and_again_exports_the_same_bytes(texts: list[str], tmp_path: Path):
    """SIGKILL from outside: twice within saves, at a random moment of training, and while starting up."""
    settings = {**SETTINGS, "steps": 40, "checkpoint_every": 4, "ema.decay": 0.9, "eval_every": 10}
    arguments = ["--data", *texts]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    train(tiny_recipe(*texts, **settings), tmp_path / "whole")  # in this process, the others in their own
    deaths = kill_again_and_again(arguments, tmp_path / "killed", kills=4, seed=5)
    assert len(deaths) == 4
    for seed in range(4):  # a busy machine may let a save end before the kill
        if not any(death.in_save for death in deaths):
            deaths += kill_again_and_again(arguments, tmp_path / "killed", kills=1, seed=seed)
    assert any(death.in_save for death in deaths)
    finish(arguments, tmp_path / "killed")
    expected = outcome(tmp_path / "whole", tmp_path / "exported-whole")
    assert "ema/model.safetensors" in expected
    assert outcome(tmp_path / "killed", tmp_path / "exported-killed") == expected
