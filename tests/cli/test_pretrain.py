"""`fireflyer pretrain` as users meet it: what it refuses and in which words, what it shows, how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fireflyer.cli.main import main

RECIPE = """
steps = 4
batch_size = 2
seq_len = 32
threads = 1
device = "cpu"
checkpoint_every = 2
eval_every = 2
eval_rows = 2

[model]
vocab_size = 300
hidden_size = 16
intermediate_size = 24
moe_intermediate_size = 8
num_hidden_layers = 2
first_k_dense_replace = 1
num_attention_heads = 2
q_lora_rank = 8
kv_lora_rank = 8
qk_nope_head_dim = 4
qk_rope_head_dim = 4
v_head_dim = 4
n_routed_experts = 4
n_shared_experts = 1
num_experts_per_tok = 2
n_group = 2
topk_group = 1
routed_scaling_factor = 1.0
max_position_embeddings = 64
num_nextn_predict_layers = 1

[data]
held_out = 0.1
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with tiny.toml and forty short documents in text/."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(RECIPE)
    Path("text").mkdir()
    for number in range(40):
        Path(f"text/{number}.txt").write_text(f"Number {number} is followed by number {number + 1}. " * 5)
    return tmp_path


@pytest.fixture
def pretrain(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in `here` on text/ (unless told otherwise); gives exit code, stdout and stderr."""

    def command(*options: str, recipe: str = "tiny.toml", data: str | None = "text") -> tuple[int, str, str]:
        sources = [] if data is None else ["--data", data]
        code = main(["pretrain", "--recipe", recipe, *sources, *options])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, one line on stderr that has these words in it, and no run folder."""
    code, _, err = result
    assert code == 2, err
    assert err.count("\n") == 1
    assert err.startswith("fireflyer: ")
    for word in words:
        assert word in err
    assert not Path("run").exists()


# --- Refusals


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optimizer.beta=0.9", ("unknown key optimizer.beta", "did you mean optimizer.betas?")),
        ("batch_size=many", ("batch_size", "'many'", "--set batch_size=many")),
        ("model.qk_rope_head_dim=3", ("qk_rope_head_dim 3 is odd",)),
        ("model.num_experts_per_tok=9", ("num_experts_per_tok 9", "n_routed_experts 4")),
        ("model.n_group=3", ("n_group 3", "n_routed_experts 4")),
        ("seq_len=65", ("seq_len = 65", "max_position_embeddings = 64")),
        ("batch_size=4096", ("batch",)),
    ],
)
def test_bad_settings(pretrain: Callable[..., tuple[int, str, str]], setting: str, words: tuple[str, ...]) -> None:
    refused(pretrain("--run", "run", "--set", setting), *words)


def write_parquet(path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"body": ["some text"]})
    parquet.write_table(table, path)


def write(content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda path: path.write_bytes(data)


BAD_DATA: dict[str, tuple[str, Callable[[Path], object], tuple[str, ...]]] = {
    "absent": ("nowhere.txt", lambda path: None, ("nowhere.txt",)),
    "empty file": ("empty.txt", write(""), ("empty.txt",)),
    "empty folder": ("folder", Path.mkdir, ("folder",)),
    "unknown kind": ("image.png", write(b"\x89PNG"), ("image.png",)),
    "no text key": ("d.jsonl", write('{"text": "a"}\n{"body": "b"}\n'), ("d.jsonl", "line 2", "text")),
    "broken JSON": ("d.jsonl", write('{"text": "a"}\n{"text": \n'), ("d.jsonl", "line 2")),
    "no column": ("d.parquet", write_parquet, ("d.parquet", "text", "body")),
    "not UTF-8": ("d.txt", write(b"good \xff bad"), ("d.txt", "byte 5", "--encoding-errors replace")),
    "too little": ("d.txt", write("A few words."), ("batch",)),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(pretrain: Callable[..., tuple[int, str, str]], case: str) -> None:
    name, make, words = BAD_DATA[case]
    make(Path(name))
    refused(pretrain("--run", "run", data=name), *words)


def test_no_data_and_no_folder(pretrain: Callable[..., tuple[int, str, str]]) -> None:
    refused(pretrain("--run", "run", data=None), "--data")
    code, out, err = pretrain()  # the recipe is tiny.toml
    assert code == 0, err
    assert "runs/tiny: finished 4 steps" in out
    assert Path("runs/tiny/summary.json").is_file()


def test_a_bad_tokenizer_or_checkpoint_is_refused_before_anything_is_written(
    pretrain: Callable[..., tuple[int, str, str]],
) -> None:
    Path("t.json").write_text("{}")
    refused(pretrain("--run", "run", "--tokenizer", "t.json"), "t.json")
    refused(pretrain("--run", "run", "--from", "nowhere"), "--from nowhere")
    Path("empty").mkdir()
    refused(pretrain("--run", "run", "--from", "empty"), "empty")


def test_invalid_utf8_is_replaced_on_demand(pretrain: Callable[..., tuple[int, str, str]]) -> None:
    Path("text/bad.txt").write_bytes(b"good \xff bad")
    refused(pretrain("--run", "run"), "text/bad.txt", "byte 5")
    code, _, err = pretrain("--run", "run", "--encoding-errors", "replace")
    assert code == 0, err


def test_a_folder_that_is_no_run_is_left_alone(pretrain: Callable[..., tuple[int, str, str]]) -> None:
    Path("letters").mkdir()
    Path("letters/dear.txt").write_text("Dear reader")
    refused(pretrain("--run", "letters"), "letters", "dear.txt")
    refused(pretrain("--run", "tiny.toml"), "tiny.toml")
    assert [path.name for path in Path("letters").iterdir()] == ["dear.txt"]


# --- Dry run


def test_dry_run_shows_the_reports_schedule_without_torch_or_files(here: Path) -> None:
    script = (
        "import sys; from fireflyer.cli.main import main; code = main(sys.argv[1:]);"
        " assert 'torch' not in sys.modules; sys.exit(code)"
    )
    before = sorted(here.rglob("*"))
    command = [sys.executable, "-c", script, "pretrain", "--recipe", "deepseek-v3", "--dry-run"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for boundary in ("469B", "10T", "14.3T", "14.633T", "14.8T", "671,026,419,200", "2,664,000 H800 hours"):
        assert boundary in text
    facts = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [row["tokens"] for row in facts["schedule"]][-4:] == [
        10 * 10**12,
        14300 * 10**9,
        14633 * 10**9,
        14800 * 10**9,
    ]
    assert facts["steps"] == facts["schedule"][-1]["step"] == 242_785
    assert facts["train"]["usd"] == pytest.approx(5.328e6)
    assert sorted(here.rglob("*")) == before


def test_dry_run_of_epochs_says_what_is_not_known_yet(pretrain: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = pretrain("--dry-run", "--set", "epochs=3")
    assert code == 0
    assert "3 epochs" in out


# --- Runs


def test_a_run_ends_goes_on_and_is_told_from_another(pretrain: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = pretrain("--run", "run", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["step"] == 4
    assert "bits a byte" in err
    files = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    code, out, _ = pretrain("--run", "run")
    assert code == 0
    assert "finished already" in out
    assert files == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    code, _, err = pretrain("--run", "run", "--set", "optimizer.weight_decay=0.2")
    assert code == 2
    assert "optimizer.weight_decay: 0.1 -> 0.2" in err
    assert files == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}

    code, out, _ = pretrain("--run", "run", "--set", "steps=6", "--set", "checkpoint_every=1")
    assert code == 0
    assert "goes on after step 4 of 6 steps" in out
    metrics = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert {"tokens", "loss", "mtp_loss", "balance_loss", "lr", "grad_norm", "tokens_per_s", "max_vio"} <= set(
        metrics[0]
    )


def test_continued_pretraining_starts_from_the_checkpoints_weights(
    pretrain: Callable[..., tuple[int, str, str]],
) -> None:
    assert pretrain("--run", "first")[0] == 0
    still = ("--set", "steps=1", "--set", "schedule.lr=1e-12", "--set", "balance.bias_speed=0")
    code, _, err = pretrain("--run", "second", "--from", "first", *still)
    assert code == 0, err
    newest = load_file("first/checkpoints/step-00000004/model.safetensors")
    begun = load_file("second/checkpoints/step-00000001/model.safetensors")
    assert all(torch.allclose(begun[name], newest[name], atol=1e-6) for name in newest)
    assert Path("first/tokenizer.json").read_bytes() == Path("second/tokenizer.json").read_bytes()


def damage(kind: str, path: Path) -> None:
    tensors = load_file(path)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors[name + "_extra"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["missing", "extra", "misshaped"])
def test_a_checkpoint_with_a_wrong_tensor_is_refused_by_its_name(
    pretrain: Callable[..., tuple[int, str, str]], kind: str
) -> None:
    assert pretrain("--run", "first", "--set", "steps=1")[0] == 0
    assert main(["export", "first", "exported"]) == 0
    damage(kind, next(Path("exported").glob("*.safetensors")))
    result = pretrain("--run", "run", "--from", "exported", "--set", "steps=1")
    refused(result, "model.layers.1.mlp.experts.2.up_proj.weight")


@pytest.fixture
def long_run(here: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of a great many steps in another process, past its first steps."""
    command = [sys.executable, "-m", "fireflyer", "pretrain", "--recipe", "tiny.toml", "--data", "text", "--run", "run"]
    command += ["--set", "steps=100000", "--set", "checkpoint_every=100000", "--set", "eval_every=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_sigterm_saves_and_exits_75_and_the_same_command_goes_on(
    long_run: subprocess.Popen[str], pretrain: Callable[..., tuple[int, str, str]]
) -> None:
    long_run.send_signal(signal.SIGTERM)
    _, err = long_run.communicate(timeout=120)
    assert long_run.returncode == 75, err
    assert err.startswith("fireflyer: run: stopped and saved at step")
    (saved,) = Path("run/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert step >= 3
    code, out, err = pretrain("--run", "run", "--set", f"steps={step + 1}", "--set", "eval_every=0")
    assert code == 0, err
    assert f"goes on after step {step:,} of {step + 1:,} steps" in out
