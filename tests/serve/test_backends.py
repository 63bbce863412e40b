"""`serve --backend`: a stand-in program on PATH tells which words, environment and signals reach it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fireflyer.cli.main import main
from fireflyer.config import load_config
from fireflyer.serve.backends import BackendOptions, sglang_command, vllm_command

STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
from pathlib import Path
said = Path(os.environ["SAID"])
def stop(number, frame):
    said.with_name("signal").write_text(str(number))
    os._exit(7)
signal.signal(signal.SIGTERM, stop)
part = said.with_name("part")
part.write_text(json.dumps([sys.argv, os.environ.get("VLLM_API_KEY"), os.getpid()]))
part.rename(said)
if "wait" in os.environ:
    time.sleep(60)
sys.exit(3)
"""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder with both programs in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vllm", "sglang"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    return folder


def started(bin_folder: Path, checkpoint: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "SAID": str(bin_folder.parent / "said"),
        **environment,
    }
    command = [sys.executable, "-m", "fireflyer", "serve", str(checkpoint), *words]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_the_process_becomes_vllm_and_its_exit_code_and_signals_are_its_own(bin_folder, checkpoint, tmp_path):
    port = free_port()
    process = started(
        bin_folder, checkpoint, "--backend", "vllm", "--port", str(port), "--max-length", "128", wait="1",
        FIREFLYER_API_KEY="secret",
    )  # fmt: skip
    for _ in range(600):
        if (tmp_path / "said").exists():
            break
        time.sleep(0.05)
    argv, key, pid = json.loads((tmp_path / "said").read_text())
    assert argv[1:3] == ["serve", str(Path(checkpoint).resolve())]
    assert argv[argv.index("--port") + 1] == str(port)
    assert argv[argv.index("--max-model-len") + 1] == "128"
    assert key == "secret"
    assert "secret" not in " ".join(argv)
    assert pid == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 7
    assert (tmp_path / "signal").read_text() == str(int(signal.SIGTERM))
    assert process.stderr is not None
    assert f"handed to vllm: API http://127.0.0.1:{port}/v1" in process.stderr.read()


def test_sglang_and_its_exit_code(bin_folder, checkpoint, tmp_path):
    words = ["--backend", "sglang", "--port", str(free_port()), "--served-model-name", "v3", "--api-key", "k"]
    assert started(bin_folder, checkpoint, *words).wait(60) == 3
    argv, _, _ = json.loads((tmp_path / "said").read_text())
    assert argv[1:4] == ["serve", "--model-path", str(Path(checkpoint).resolve())]
    assert argv[argv.index("--served-model-name") + 1] == "v3"
    assert argv[argv.index("--api-key") + 1] == "k"


def test_v3s_words():
    config = load_config("deepseek-v3")
    options = BackendOptions(
        checkpoint=Path("/models/v3"),
        host="0.0.0.0",
        port=8000,
        served_model_name="v3",
        api_key="k",
        tensor_parallel=16,
        expert_parallel=True,
        max_length=32768,
        max_num_seqs=256,
    )
    vllm = vllm_command("vllm", options, config)
    assert vllm.words == [
        *("vllm", "serve", "/models/v3", "--host", "0.0.0.0", "--port", "8000", "--served-model-name", "v3"),
        *("--tensor-parallel-size", "16", "--enable-expert-parallel", "--max-model-len", "32768"),
        *("--max-num-seqs", "256", "--speculative-config"),
        '{"method": "deepseek_mtp", "num_speculative_tokens": 1}',
    ]
    assert vllm.environment == {"VLLM_API_KEY": "k"}
    sglang = sglang_command("sglang", options, config)
    assert sglang.words == [
        *("sglang", "serve", "--model-path", "/models/v3", "--host", "0.0.0.0", "--port", "8000"),
        *("--served-model-name", "v3", "--tp-size", "16", "--ep-size", "16", "--context-length", "32768"),
        *("--max-running-requests", "256", "--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1"),
        *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2", "--api-key", "k"),
    ]
    plain = BackendOptions(Path("/models/v2"), "127.0.0.1", 8000, "v2")
    for command in (vllm_command, sglang_command):
        assert not any("speculative" in word for word in command("x", plain, load_config("deepseek-v2")).words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--deterministic"], "--deterministic is for fireflyer's own server, not for vllm"),
        (["--quantization", "int8"], "--quantization is for fireflyer's own server"),
        (["--tensor-parallel", "3"], "--tensor-parallel 3 doesn't divide the model's"),
        (["--tensor-parallel", "0"], "--tensor-parallel 0"),
        (["--port", "0"], "--port 0: vllm wants a port"),
    ],
)
def test_refused_in_one_line(bin_folder, checkpoint, capsys, monkeypatch, words, said):
    monkeypatch.setenv("PATH", str(bin_folder))
    assert main(["serve", str(checkpoint), "--backend", "vllm", *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_port_in_use_and_no_program(bin_folder, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(bin_folder))
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert main(["serve", str(checkpoint), "--backend", "vllm", "--port", str(port)]) == 2
        assert "is in use" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert main(["serve", str(checkpoint), "--backend", "sglang"]) == 2
    assert "type: pip install sglang" in capsys.readouterr().err
    assert main(["serve", str(checkpoint), "--expert-parallel"]) == 2
    assert "are for --backend" in capsys.readouterr().err
