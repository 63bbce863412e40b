"""`fireflyer chat`: history, commands, whole characters, Ctrl-C in a real terminal, models that can't chat."""

import json
import os
import select
import shutil
import subprocess
import sys
import time

import pytest

from fireflyer.cli import chat
from fireflyer.cli.main import main
from fireflyer.infer.engine import Engine
from fireflyer.infer.llm import LLM
from fireflyer.text.tokenizer import Tokenizer


@pytest.fixture
def fed(monkeypatch):
    """The prompts that reached the model, as text."""
    prompts = []
    stream_sync = LLM.stream_sync

    def record(llm, prompt, params):
        assert llm.tokenizer is not None
        prompts.append(llm.tokenizer.decode(prompt, skip_special=False))
        return stream_sync(llm, prompt, params)

    monkeypatch.setattr(LLM, "stream_sync", record)
    return prompts


BEGIN, END, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)


def test_a_conversation_through_a_pipe(tiny_checkpoint, scripted, stdin, fed, capsys):
    scripted(["ja 🎉".encode(), b"two", b"three"])
    stdin(b"hi\n\n  again  \n/reset\nnew\n/quit\nnever\n")
    assert main(["chat", str(tiny_checkpoint), "--system", "be"]) == 0
    out, err = capsys.readouterr()
    assert out == "ja 🎉\ntwo\nthree\n"
    assert "only pretrained, never taught to chat" in err
    assert fed == [
        f"{BEGIN}be{USER}hi{ASSISTANT}",
        f"{BEGIN}be{USER}hi{ASSISTANT}ja 🎉{END}{USER}again{ASSISTANT}",
        f"{BEGIN}be{USER}new{ASSISTANT}",
    ]


def test_what_is_no_command_and_what_is(tiny_checkpoint, scripted, stdin, fed, capsys):
    scripted([b"ok"])
    stdin(b"/rset\n/etc/hosts is a file")
    assert main(["chat", str(tiny_checkpoint)]) == 0
    assert "unknown command /rset" in capsys.readouterr().err
    assert fed == [f"{BEGIN}{USER}/etc/hosts is a file{ASSISTANT}"]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(tiny_checkpoint, scripted, stdin, fed, monkeypatch, capsys):
    scripted([b"abcdef"])
    step, steps = Engine.step, []

    def interrupted_once(engine):
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted_once)
    stdin(b"one\ntwo\n")
    assert main(["chat", str(tiny_checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert out == "abc\ndef\n"  # the script goes on where it was cut
    assert "[stopped]" in err
    assert fed[1] == f"{BEGIN}{USER}one{ASSISTANT}abc{END}{USER}two{ASSISTANT}"


def test_an_answer_cut_by_max_tokens_is_told(tiny_checkpoint, scripted, stdin, capsys):
    scripted([b"abcdef"])
    stdin(b"one\n")
    assert main(["chat", str(tiny_checkpoint), "--max-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == "abc\n"
    assert "cut at 3 tokens" in err


def test_a_full_context_is_told_and_the_chat_goes_on(tiny_checkpoint, scripted, stdin, fed, tmp_path, capsys):
    small = tmp_path / "small"
    shutil.copytree(tiny_checkpoint, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    scripted([b"yes"])
    stdin(b"x" * 60 + b"\nhi\n")
    assert main(["chat", str(small)]) == 0
    out, err = capsys.readouterr()
    assert out == "yes\n"
    assert "context of 40" in err
    assert fed[-1] == f"{BEGIN}{USER}hi{ASSISTANT}"  # what failed is not kept


def test_a_template_of_its_makers_is_believed(tiny_checkpoint, stdin, tmp_path, capsys):
    taught = tmp_path / "taught"
    shutil.copytree(tiny_checkpoint, taught)
    (taught / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[-1]['content'] }}<｜Assistant｜>")
    stdin(b"")
    assert main(["chat", str(taught)]) == 0
    assert "taught" not in capsys.readouterr().err


def test_without_a_template_the_form_is_plain_text(tiny_checkpoint, scripted, stdin, fed, tmp_path, capsys):
    """A tokenizer without DeepSeek's User token: the words of V2's template, and the next "User:" ends the answer."""
    plain = tmp_path / "plain"
    shutil.copytree(tiny_checkpoint, plain)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (plain / name).read_text(encoding="utf-8").replace(USER, "<｜Nobody｜>")
        settings = json.loads(text)
        settings.pop("chat_template", None)
        (plain / name).write_text(json.dumps(settings), encoding="utf-8")
    assert Tokenizer.from_file(plain).chat_template is None
    scripted([b" sure\n\nUser: and", b" b"])
    stdin(b"hi\n/quit\n")
    assert main(["chat", str(plain)]) == 0
    out, err = capsys.readouterr()
    assert out == " sure\n"
    assert "never taught to chat" in err
    assert fed == [f"{BEGIN}User: hi\n\nAssistant:"]


def test_refusals_are_one_line(tiny_checkpoint, stdin, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["chat", str(bare)]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    stdin(b"\xff\xfe\n")
    assert main(["chat", str(tiny_checkpoint)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("fireflyer: stdin: invalid UTF-8")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_in_a_terminal(tiny_checkpoint):
    """The real thing: an answer that goes round and round, Ctrl-C, the prompt again, Ctrl-C at the prompt, Ctrl-D."""
    import pty

    try:
        here, there = pty.openpty()
    except OSError as error:  # a chroot without /dev/pts
        pytest.skip(f"no pseudo-terminal to be had: {error}")
    options = ["--max-tokens", "40000", "--temperature", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fireflyer", "chat", str(tiny_checkpoint), *options],
        stdin=there,
        stdout=there,
        stderr=there,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(there, __import__("termios").TIOCSCTTY, 0),
        close_fds=True,
    )
    os.close(there)
    seen = b""

    def read_until(text, seconds=240):
        nonlocal seen
        until = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < until, seen
            if select.select([here], [], [], 0.2)[0]:
                seen += os.read(here, 4096)
        seen = seen[seen.index(text) + len(text) :]

    try:
        read_until(b"> ")
        os.write(here, b"hi\n")
        read_until(b"hi\r\n")
        while len(seen) < 20:
            seen += os.read(here, 4096)
        os.write(here, b"\x03")
        read_until(b"[stopped]")
        read_until(b"> ")
        time.sleep(0.5)  # readline shows the prompt a moment before it looks for signals
        os.write(here, b"\x03")
        read_until(chat._COMMANDS.encode())
        read_until(b"> ")
        os.write(here, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        os.close(here)
