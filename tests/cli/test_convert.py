"""`fireflyer convert`: counts from names alone, signals and kills in a process of its own, memory, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from fp8_checkpoint import PUBLISHED, SHAPE, write_config, write_fp8
from published_models import edit_config, files_tensors, naive_listing

from fireflyer.checkpoint.conversion_plan import Precision
from fireflyer.checkpoint.names import published_names
from fireflyer.cli.convert import PRECISIONS
from fireflyer.cli.main import main
from fireflyer.config import load_config
from fireflyer.cost.memory import fp8_checkpoint_bytes

# Each step takes a while, and every one is saved.
SLOWLY = """
import sys, time
from fireflyer.checkpoint import convert, safetensors_file
safetensors_file.CHUNK_BYTES = 1
convert.SAVE_EVERY_S = 0
real = convert._write_at
def write_at(*arguments):
    time.sleep(0.02)
    return real(*arguments)
convert._write_at = write_at
from fireflyer.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("name", "tensors", "num_bytes", "ignored"),
    [("deepseek-v3", 91_991, 688_574_839_360, 0), ("kimi-k2", 139_644, None, 61), ("deepseek-v2-lite", 5_291, None, 0)],
)
def test_the_released_files_are_counted_from_their_names(
    name: str, tensors: int, num_bytes: int | None, ignored: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", name, str(tmp_path / "out"), "--to", "bf16", "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    source, destination = facts["source"], facts["destination"]
    assert (source["tensors"], source["ignored"]) == (tensors, ignored)
    assert num_bytes in (source["bytes"], None)
    if name == "deepseek-v3":
        assert source["by_dtype"]["float8_e4m3fn"]["numbers"] == 680_571_043_840
        assert source["by_dtype"]["bfloat16"]["numbers"] == 3_918_786_560
        assert source["by_dtype"]["float32"]["numbers"] == 41_555_600
        assert destination["numbers"] == 684_489_845_504
        assert destination["bytes"] == 2 * 684_489_845_504 + 2 * 59 * 256
    elif name == "kimi-k2":
        assert source["numbers"] == 1_026_470_731_056 - 61 * 56
    else:
        assert source["numbers"] == destination["numbers"] == 15_706_484_224
    assert not list(tmp_path.iterdir())


def test_an_index_without_its_files_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config("deepseek-v3").replace(num_hidden_layers=4)
    names = published_names(config)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00163.safetensors")}))
    arguments = ["convert", str(tmp_path), str(tmp_path.parent / "out"), "--to", "fp8", "--dry-run"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path} to fp8, counted from names alone" in out
    assert out.count(f"{fp8_checkpoint_bytes(config):,}") == 2  # read and written
    assert out.count(f"{len(names):,}") == 2
    for spoilt, message in (
        ([*names, "model.layers.3.self_attn.extra"], "'model.layers.3.self_attn.extra' has no place"),
        ([n for n in names if n != "lm_head.weight"], "lm_head.weight is missing"),
        ([*names, "model.layers.3.mlp.gate.weight_scale_inv"], "gate.weight_scale_inv' has no place"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(spoilt, "model-00001-of-00163.safetensors")}))
        assert main(arguments) == 2
        assert message in one_line(capsys)


def test_a_folder_here_is_counted_before_it_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_fp8(tmp_path / "fp8")
    arguments = ["convert", str(tmp_path / "fp8"), str(tmp_path / "out"), "--to", "bf16"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    stored = files_tensors(tmp_path / "fp8")
    assert facts["source"]["tensors"] == len(stored)
    assert facts["source"]["bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    done = json.loads(out)
    assert done["tensors"] == facts["destination"]["tensors"] == len(naive_listing(SHAPE))
    assert done["bytes"] == facts["destination"]["file_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert "file 1 of 1" in err
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "converted already to bf16" in out
    assert err == ""


def test_the_command_offers_every_precision() -> None:
    assert get_args(Precision) == PRECISIONS


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], stderr=subprocess.PIPE, text=True)


def steps_done(folder: Path) -> int:
    try:
        return json.loads((folder / "conversion.json").read_text())["steps"]
    except (OSError, ValueError):
        return -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_by_a_signal_it_goes_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fireflyer.checkpoint.safetensors_file.CHUNK_BYTES", 1)
    write_fp8(tmp_path / "fp8")
    assert main(["convert", str(tmp_path / "fp8"), str(tmp_path / "whole"), "--to", "bf16"]) == 0
    arguments = ["convert", str(tmp_path / "fp8"), str(tmp_path / "out"), "--to", "bf16"]
    process = start(arguments)
    deadline = time.monotonic() + 60
    while steps_done(tmp_path / "out") < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        assert "stopped and saved; the same command goes on from there" in err.splitlines()[-1]
    done = steps_done(tmp_path / "out")
    assert done >= 10
    assert not (tmp_path / "out" / "model.safetensors").exists()
    capsys.readouterr()
    assert main(arguments) == 0
    assert "are there; going on" in capsys.readouterr().err
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "out").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_limit_on_files_is_a_full_disk(tmp_path: Path) -> None:
    write_fp8(tmp_path / "fp8")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1))" + SLOWLY
    arguments = ["convert", str(tmp_path / "fp8"), str(tmp_path / "out"), "--to", "fp32"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "can't be written (File too large); free some space, and the same command goes on" in done.stderr
    assert main(arguments) == 0


MEASURE = """
import sys
from fireflyer.checkpoint import safetensors_file
from fireflyer.checkpoint.convert import convert
safetensors_file.CHUNK_BYTES = 1 << 20
def rss(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
convert(sys.argv[1], sys.argv[2], "fp8")  # imports, threads and buffers are there
before = rss("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
convert(sys.argv[3], sys.argv[4], sys.argv[5])
print(rss("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own count of memory")
@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_memory_is_bounded_by_the_largest_tensor(to: str, tmp_path: Path) -> None:
    """100 MB of weights, the largest tensor 4 MB: written as holes, which take no disk."""
    write_fp8(tmp_path / "small")
    write_holes(tmp_path / "large")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    paths = [tmp_path / name for name in ("small", "first", "large", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths), to], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    size = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert size > 100_000_000
    assert int(done.stdout) < 40_000_000


def write_holes(folder: Path) -> None:
    """A bf16 checkpoint of zeros, in safetensors whose data are holes; gate biases in fp32."""
    shape = {**SHAPE, "hidden_size": 1024, "moe_intermediate_size": 256, "n_routed_experts": 32}
    shape |= {"vocab_size": 2048, "num_nextn_predict_layers": 0, "num_hidden_layers": 3, "num_experts_per_tok": 2}
    folder.mkdir()
    header, end = {}, 0
    for name, sides in sorted(naive_listing(shape).items(), key=lambda item: "bias" not in item[0]):
        width = 4 if "bias" in name else 2
        size = int(torch.Size(sides).numel()) * width
        header[name] = {"dtype": "F32" if width == 4 else "BF16", "shape": sides, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    write_config(folder, **shape)


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fp8(tmp_path / "fp8")
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["deepseek-v3", "out", "--to", "bf16"], "deepseek-v3: a shape without weights; give the folder"),
        (["absent", "out", "--to", "bf16"], "absent: no such folder"),
        (["fp8", "out", "--to", "fp16"], "'bf16', 'fp32', 'fp8', 'int8', 'int4'"),
        (["fp8", "out"], "--to"),
        (["fp8", "fp8/out", "--to", "bf16"], "lies within"),
        (["nothing", "out", "--to", "bf16", "--dry-run"], "'nothing' is no file or folder and no preset"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in one_line(capsys)
    edit_config(tmp_path / "fp8", quantization_config=PUBLISHED | {"fmt": "e5m2"})
    assert main(["convert", "fp8", "out", "--to", "bf16"]) == 2
    assert "quantization_config.fmt 'e5m2' isn't read" in one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["fp8"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fireflyer: ")
    assert err.count("\n") == 1
    return err
