"""The loop against a training step written out by hand, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_run import checkpoint_bytes, read_tensors, tiny_recipe, write_text

from fireflyer.checkpoint.hf import load_model
from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.checkpoint.run_folder import read_metrics
from fireflyer.data.packing import Batch
from fireflyer.errors import Stopped, UserError
from fireflyer.infer.llm import LLM
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import Decoder
from fireflyer.train import events, loop, setup, snapshot, summary
from fireflyer.train.loop import Trainer, train
from fireflyer.train.schedule import batch_size_at, bias_speed, learning_rate, mtp_weight
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import check_folder, lay_out, open_inputs, open_state


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl", 300)


def open_trainer(
    recipe: Recipe, run_dir: Path, on_event: Callable[[events.Event], None] = lambda event: None
) -> Trainer:
    inputs = open_inputs(recipe, run_dir, check_folder(recipe, run_dir), on_event)
    run_dir.mkdir(exist_ok=True)
    lay_out(inputs, run_dir)
    return Trainer(inputs, open_state(inputs, run_dir, on_event), run_dir, on_event)


def final(run_dir: Path) -> Path:
    path = newest_good_checkpoint(run_dir)
    assert path is not None
    return path


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time of change and content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- One step after another, by hand


def naive_losses(model: Decoder, batch: Batch, mask_documents: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Main, MTP and balance loss with whole logits and plain loops over rows."""
    documents = batch.document_ids_BT if mask_documents else None
    out = model(batch.input_ids_BT, positions=batch.positions_BT, document_ids=documents)
    labels = batch.labels_BT
    valid = int((labels != -100).sum())
    main = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum") / valid
    mtp = torch.zeros(())
    for depth, logits in enumerate(out.mtp_logits, start=1):
        for b in range(labels.shape[0]):
            for i in range(labels.shape[1] - depth):
                same = not mask_documents or batch.document_ids_BT[b, i] == batch.document_ids_BT[b, i + depth]
                if labels[b, i + depth] != -100 and same:
                    loss = F.cross_entropy(logits[b, i][None], labels[b, i + depth][None])
                    mtp = mtp + loss / valid / len(out.mtp_logits)
    trunk = model.trunk(batch.input_ids_BT, positions=batch.positions_BT, document_ids=documents)
    balance = torch.zeros(())
    for routing in trunk.routing:
        rows, tokens = routing.shape_BT
        experts, chosen = routing.scores_NE.shape[1], routing.indices_NK.shape[1]
        for scores in routing.scores_NE.reshape(rows, tokens, experts):
            top = scores.topk(chosen, dim=-1).indices.flatten().tolist()
            frequency = torch.tensor([top.count(e) * experts / (chosen * tokens) for e in range(experts)])
            probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
            balance = balance + (frequency * probability).sum() / rows
    return main, mtp, balance


@torch.no_grad()
def naive_counts(model: Decoder, batch: Batch, mask_documents: bool) -> dict[int, list[int]]:
    """By MoE layer, MTP's too: how many tokens of the whole batch chose each expert."""
    documents = batch.document_ids_BT if mask_documents else None
    trunk = model.trunk(batch.input_ids_BT, positions=batch.positions_BT, document_ids=documents)
    counts = {}
    for routing in trunk.routing:
        chosen = routing.indices_NK.flatten().tolist()
        counts[routing.layer_index] = [chosen.count(e) for e in range(routing.scores_NE.shape[1])]
    return counts


@pytest.mark.parametrize(
    "settings",
    [
        {"data__mask_documents": True, "parallel__micro_batch_size": 1},
        {"parallel__micro_batch_size": 2, "parallel__recompute": True, "balance__bias_until": "50%"},
        {},
    ],
    ids=["masked-micro1", "micro2-recomputed", "whole"],
)
def test_steps_equal_a_loop_written_by_hand(settings: dict, text: Path, tmp_path: Path):
    """Three steps of AdamW with clipping, both extra losses, gate biases and average, against plain torch."""
    recipe = tiny_recipe(
        text,
        steps=3,
        ema__decay=0.9,
        balance__sequence_alpha=0.5,
        balance__bias_speed=0.01,
        optimizer__grad_clip=0.3,
        schedule__lr=0.01,
        **settings,
    )
    trainer = open_trainer(recipe, tmp_path / "run")
    masked = recipe.data.mask_documents
    model = open_trainer(recipe, tmp_path / "other").state.model  # the same random weights
    loader = open_trainer(recipe, tmp_path / "other").state.objective
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    biases = {index: torch.zeros(8) for index, _ in model.gate_biases()}
    assert sorted(biases) == [1, 2, 3, 4]  # two MoE layers and two MTP modules
    average: dict[str, torch.Tensor] = {}
    tokens = 0
    for step in range(3):
        batch = loader.next_batch(batch_size_at(recipe, tokens))
        main, mtp, balance = naive_losses(model, batch, masked)
        counts = naive_counts(model, batch, masked)
        (main + mtp_weight(recipe, tokens) * mtp + 0.5 * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(recipe, step, tokens)
        adamw.step()
        adamw.zero_grad()
        for index, buffer in model.gate_biases():
            mean = sum(counts[index]) / 8
            for e, count in enumerate(counts[index]):
                biases[index][e] += bias_speed(recipe, tokens) * ((count < mean) - (count > mean))
            buffer.copy_(biases[index])
        for name, parameter in model.named_parameters():
            value = parameter.detach().clone()
            average[name] = 0.9 * average[name] + 0.1 * value if step else value

        metrics = trainer.step()
        tokens += batch.input_ids_BT.numel()
        assert metrics.tokens == tokens
        assert metrics.loss == pytest.approx(main.item(), rel=1e-5)
        assert metrics.values["mtp_loss"] == pytest.approx(mtp.item(), rel=1e-5)
        assert metrics.values["balance_loss"] == pytest.approx(balance.item(), rel=1e-5)
        assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        worst = max(max(c) / (sum(c) / 8) - 1 for c in counts.values())
        assert metrics.max_vio == pytest.approx(worst)
    ours = dict(trainer.state.model.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(trainer.state.average[name], average[name], rtol=1e-3, atol=2e-5)
    for index, bias in trainer.state.model.gate_biases():
        assert bias.dtype == torch.float32
        torch.testing.assert_close(bias, biases[index], rtol=0, atol=1e-7)
        assert bool((bias != 0).any())
    trainer.close()


def test_split_and_recomputation_leave_counts_and_losses(text: Path, tmp_path: Path):
    """Counts are of the whole batch, once a token: the same under micro-batches and recomputation (to the integer)."""
    rows = []
    for number, settings in enumerate(
        ({}, {"parallel__micro_batch_size": 1}, {"parallel__micro_batch_size": 2, "parallel__recompute": True})
    ):
        trainer = open_trainer(tiny_recipe(text, **settings), tmp_path / str(number))
        batch = trainer.state.objective.next_batch(4)
        result = trainer.forward_backward(batch)
        rows.append((result.counts, *(result.values[name] for name in ("loss", "mtp_loss", "balance_loss"))))
        assert sum(int(c.sum()) for c in result.counts.values()) == 4 * 2 * (24 + 24 + 23 + 22)
        trainer.close()
    for counts, *losses in rows[1:]:
        assert {k: v.tolist() for k, v in counts.items()} == {k: v.tolist() for k, v in rows[0][0].items()}
        assert losses == pytest.approx(list(rows[0][1:]), rel=1e-6)


# --- What a run leaves and tells


def test_the_load_of_experts_and_what_is_written_over_time(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EXPERT_ROWS", 3)
    recipe = tiny_recipe(text, steps=7, eval_every=3, eval_samples=2, balance__bias_speed=0.01)
    train(recipe, tmp_path / "run")
    rows = {name: read_metrics(tmp_path / "run", name=f"{name}.jsonl") for name in ("metrics", "experts", "samples")}
    assert [row["step"] for row in rows["experts"]] == [2, 4, 6, 7]
    for row in rows["experts"]:
        busiest = max(max(load) for load in row["load"].values()) - 1
        assert busiest == pytest.approx(rows["metrics"][row["step"] - 1]["max_vio"], abs=1e-3)
        assert all(sum(load) == pytest.approx(8, abs=0.01) for load in row["load"].values())
    biases = dict(load_model(tmp_path / "run").gate_biases())
    assert {int(layer) for layer in rows["experts"][-1]["bias"]} == biases.keys()
    for layer, bias in rows["experts"][-1]["bias"].items():
        assert bias == pytest.approx(biases[int(layer)].tolist(), abs=1e-5)
    assert [row["step"] for row in rows["samples"]] == [3, 3, 6, 6, 7, 7]
    assert len({row["prompt"] for row in rows["samples"]}) == 2
    held_out = open_trainer(recipe, tmp_path / "run").state.objective.held_out.batches[0]
    beginnings = [held_out.input_ids_BT[row, :12].tolist() for row in (0, 1)]
    answers = LLM(tmp_path / "run").generate(beginnings, SamplingParams(max_tokens=64, temperature=0))
    assert [row["text"] for row in rows["samples"][-2:]] == [answer.outputs[0].text for answer in answers]
    assert 0 <= rows["metrics"][-1]["mtp_acceptance"] <= 1


def test_a_run_its_files_and_its_events(text: Path, tmp_path: Path):
    told: list[events.Event] = []
    recipe = tiny_recipe(text, steps=7, eval_every=3, log_every=2)
    end = train(recipe, tmp_path / "run", on_event=told.append)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    promised = "step tokens loss mtp_loss balance_loss lr grad_norm tokens_per_s max_vio".split()
    for row in rows:
        assert set(promised) <= row.keys()
        assert ("eval_loss" in row) == ("bits_per_byte" in row) == (row["step"] in (3, 6, 7))
    assert rows[-1]["tokens"] == 7 * 4 * 24 == end.tokens
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [e.metrics.step for e in told if isinstance(e, events.StepDone)] == [2, 4, 6, 7]
    assert [e.step for e in told if isinstance(e, events.Evaluated)] == [3, 6, 7]
    assert [e.step for e in told if isinstance(e, events.Saved)] == [3, 6, 7]
    started = next(e for e in told if isinstance(e, events.Started))
    model = load_model(tmp_path / "run")
    assert started.parameters == sum(p.numel() for p in model.parameters()) + 4 * 8  # and the gate biases
    assert (started.step, started.total_steps, started.total_tokens) == (0, 7, 7 * 4 * 24)
    assert told[-1] == events.Finished(tmp_path / "run", 7, already=False)
    stored = json.loads((tmp_path / "run/summary.json").read_text())
    assert stored["loss"] == end.loss == pytest.approx(sum(row["loss"] for row in rows) / 7)
    assert stored["bits_per_byte"] == rows[-1]["bits_per_byte"]
    assert stored["flops"] == pytest.approx(started.flops_per_token * end.tokens)
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-00000006", "step-00000007"]


def test_a_finished_run_started_again_says_so_and_writes_nothing(text: Path, tmp_path: Path):
    recipe = tiny_recipe(text, steps=3)
    end = train(recipe, tmp_path / "run")
    before, told = tree(tmp_path / "run"), []
    assert train(recipe, tmp_path / "run", on_event=told.append) == end
    assert told == [events.Finished(tmp_path / "run", 3, already=True)]
    assert tree(tmp_path / "run") == before


def test_more_steps_go_on_from_the_end(text: Path, tmp_path: Path):
    """A rerun may ask for more; where no boundary depends on the length, it equals the long run."""
    points = ("schedule__constant_until", "schedule__cosine_until", "balance__bias_until", "mtp__late_from")
    constant = dict.fromkeys(points, 10**6)
    train(tiny_recipe(text, steps=4, **constant), tmp_path / "run")
    summary_file = tmp_path / "run/summary.json"
    summary_file.write_text(json.dumps({**json.loads(summary_file.read_text()), "accuracy": 0.9}))
    assert train(tiny_recipe(text, steps=4, **constant), tmp_path / "run").step == 4
    assert "accuracy" in json.loads(summary_file.read_text())  # a demo's score stays with the run that it is of
    assert train(tiny_recipe(text, steps=6, **constant), tmp_path / "run").step == 6
    assert "accuracy" not in json.loads(summary_file.read_text())
    train(tiny_recipe(text, steps=6, **constant), tmp_path / "whole")
    assert checkpoint_bytes(final(tmp_path / "run")) == checkpoint_bytes(final(tmp_path / "whole"))


def test_same_seed_same_bytes_other_seed_others(text: Path, tmp_path: Path):
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny_recipe(text, steps=3, seed=seed), tmp_path / name)
        weights.append(checkpoint_bytes(final(tmp_path / name))["model.safetensors"])
    assert weights[0] == weights[1] != weights[2]
    first = [open_trainer(tiny_recipe(text, seed=seed), tmp_path / f"fresh-{seed}").state.model for seed in (1, 2)]
    assert not torch.equal(first[0].head_weight, first[1].head_weight)


def test_evaluation_changes_nothing(text: Path, tmp_path: Path):
    """Weights, moments, gate biases, RNG and data are the same whether held-out text was scored or not."""
    train(tiny_recipe(text, steps=5, eval_every=1), tmp_path / "evaluated")
    train(tiny_recipe(text, steps=5, eval_every=0), tmp_path / "not")
    assert checkpoint_bytes(final(tmp_path / "evaluated")) == checkpoint_bytes(final(tmp_path / "not"))


def test_epochs_are_turned_into_tokens_and_repetition_is_said(tmp_path: Path):
    small = write_text(tmp_path / "small.jsonl", 25)
    told: list[events.Event] = []
    end = train(
        tiny_recipe(small, steps=10**9, data__fim_rate=0.0).model_copy(update={"steps": None, "epochs": 2.5}),
        tmp_path / "run",
        on_event=told.append,
    )
    notices = [event.text for event in told if isinstance(event, events.Notice)]
    assert any("epoch 2" in text for text in notices)
    assert any("epoch 3" in text for text in notices)
    assert not any("epoch 4" in text for text in notices)
    assert end.epochs_asked == 2.5


def test_bf16_keeps_fp32_weights_moments_and_gate_biases(text: Path, tmp_path: Path):
    train(tiny_recipe(text, steps=3, dtype="bf16"), tmp_path / "run")
    for file in ("model.safetensors", "trainer.safetensors"):
        for name, tensor in read_tensors(final(tmp_path / "run") / file).items():
            assert tensor.dtype == (torch.uint8 if name.startswith("rng.") else torch.float32), name
    config = json.loads((final(tmp_path / "run") / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


def test_compiled_equals_eager(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With tracing alone: generating code takes a minute. And one line where there is no compiler."""
    small = {"steps": 3, "model__num_hidden_layers": 2, "model__num_nextn_predict_layers": 0}
    train(tiny_recipe(text, **small), tmp_path / "eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend="eager"))
    train(tiny_recipe(text, **small, compile=True), tmp_path / "compiled")
    ours, theirs = (load_model(tmp_path / name).state_dict() for name in ("compiled", "eager"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)

    def absent(function):
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", absent)
    with pytest.raises(UserError, match=r"doesn't work here \(no C\+\+ compiler\); --set compile=false"):
        train(tiny_recipe(text, steps=3, compile=True), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_threads_are_set_stored_and_given_back(text: Path, tmp_path: Path):
    before = torch.get_num_threads()
    seen = []
    train(
        tiny_recipe(text, steps=3, threads=2), tmp_path / "run", on_event=lambda e: seen.append(torch.get_num_threads())
    )
    assert set(seen[1:]) == {2}  # the tokenizer's notice comes before
    assert torch.get_num_threads() == before
    assert "threads = 2" in (tmp_path / "run/recipe.toml").read_text()


# --- Continued pretraining


def test_from_a_checkpoint_goes_on_with_its_weights_and_tokenizer(text: Path, tmp_path: Path):
    train(tiny_recipe(text, steps=3), tmp_path / "first")
    source = final(tmp_path / "first")
    recipe = tiny_recipe(text, init_from=str(source), steps=3)
    trainer = open_trainer(recipe, tmp_path / "second")
    old = load_model(source).state_dict()
    new = trainer.state.model.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert trainer.state.step == trainer.state.tokens == 0
    trainer.close()
    assert (tmp_path / "second/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match=r"checkpoint has model.kv_lora_rank = 16, the recipe 8"):
        train(tiny_recipe(text, init_from=str(source), model__kv_lora_rank=8), tmp_path / "third")


# --- Stopping, and what is refused


def test_should_stop_saves_and_raises(text: Path, tmp_path: Path):
    asked = iter([False, True])
    told: list[events.Event] = []
    with pytest.raises(Stopped, match="stopped and saved at step 2 of 8"):
        train(
            tiny_recipe(text, checkpoint_every=2),
            tmp_path / "run",
            on_event=told.append,
            should_stop=lambda: next(asked),
        )
    assert [e.step for e in told if isinstance(e, events.Saved)] == [2]  # once, though it was due anyway
    assert final(tmp_path / "run").name == "step-00000002"
    assert not (tmp_path / "run/summary.json").exists()


def test_another_recipe_is_refused_with_the_difference(text: Path, tmp_path: Path):
    train(tiny_recipe(text, steps=3), tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run of another recipe: optimizer.weight_decay: 0.1 -> 0.2"):
        train(tiny_recipe(text, steps=3, optimizer__weight_decay=0.2), tmp_path / "run")
    assert tree(tmp_path / "run") == before


def test_a_run_begun_meanwhile_by_another_process_is_not_written_over(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real = loop.open_inputs

    def slow(*args):
        inputs = real(*args)
        monkeypatch.setattr(loop, "open_inputs", real)
        train(tiny_recipe(text, steps=3, seed=5), tmp_path / "run")
        return inputs

    monkeypatch.setattr(loop, "open_inputs", slow)
    with pytest.raises(UserError, match="another recipe: seed: 5 -> 6"):
        train(tiny_recipe(text, steps=3, seed=6), tmp_path / "run")


def test_a_folder_with_something_else_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"thesis\.tex in it but no recipe\.toml"):
        train(tiny_recipe(text), tmp_path)
    with pytest.raises(UserError, match="a file is there"):
        train(tiny_recipe(text), tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_bad_input_writes_nothing(tmp_path: Path):
    tiny = write_text(tmp_path / "tiny.jsonl", 2)
    for data, message in ((tiny, "too little data for one batch"), (tmp_path / "absent", "no data at")):
        with pytest.raises(UserError, match=message):
            train(tiny_recipe(data, batch_size=64, data__held_out=0.0), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_second_process_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "run/.lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="in use by another process"):
            train(tiny_recipe(text), tmp_path / "run")
        assert os.listdir(tmp_path / "run") == [".lock"]
    finally:
        holder.communicate()


def test_full_disk_in_a_save_stops_the_run_and_keeps_the_old_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tiny_recipe(text, steps=8)
    train(recipe, tmp_path / "whole")
    real, calls = snapshot.write_trainer_state, []

    def full(folder: Path, *rest) -> None:
        calls.append(folder)
        real(folder, *rest)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "write_trainer_state", full)
    with pytest.raises(UserError, match=r"step-00000006 can't be saved: No space left.*step-00000003 is untouched"):
        train(recipe, tmp_path / "run")
    assert final(tmp_path / "run").name == "step-00000003"
    train(recipe, tmp_path / "run")
    assert checkpoint_bytes(final(tmp_path / "run")) == checkpoint_bytes(final(tmp_path / "whole"))


def test_full_disk_elsewhere_is_one_line_too(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    for module, name, told in ((setup, "write_text", "run"), (summary, "write_text", "summary.json")):
        monkeypatch.setattr(module, name, full)
        with pytest.raises(UserError, match=rf"{told} can't be written: No space left"):
            train(tiny_recipe(text, steps=3), tmp_path / "run")
        monkeypatch.undo()
    assert train(tiny_recipe(text, steps=3), tmp_path / "run").step == 3


def test_a_save_holds_the_moment_it_began(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training goes on under a slow save; what is written is the state when it began, to the bit."""
    gate = threading.Event()
    real = snapshot.write_published

    def slow(*args, **kwargs) -> None:
        assert gate.wait(20)
        real(*args, **kwargs)

    monkeypatch.setattr(snapshot, "write_published", slow)
    trainer = open_trainer(tiny_recipe(text, ema__decay=0.5), tmp_path / "run")
    trainer.step()
    trainer.step()
    expected = {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}
    moment = trainer.state.optimizer.tensors()["model.norm.weight.exp_avg"].clone()
    average = trainer.state.average["model.norm.weight"].clone()
    trainer.save()
    trainer.step()
    assert not torch.equal(trainer.state.model.state_dict()["model.norm.weight"], expected["model.norm.weight"])
    gate.set()
    trainer.close()
    saved = load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    tensors = read_tensors(final(tmp_path / "run") / "trainer.safetensors")
    assert torch.equal(tensors["optimizer.model.norm.weight.exp_avg"], moment)
    assert torch.equal(tensors["ema.model.norm.weight"], average)
    assert json.loads((final(tmp_path / "run") / "trainer.json").read_text())["step"] == 2
