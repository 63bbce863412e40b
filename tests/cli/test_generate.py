"""`fireflyer generate`: text and JSON on stdout, talk on stderr, stdin, stops, refusals."""

import json
import shutil
import sys

import pytest
import torch

from fireflyer import LLM, SamplingParams
from fireflyer.cli.main import main


def test_text_goes_to_stdout_and_speed_to_stderr(tiny_checkpoint, capsys):
    code = main(["generate", str(tiny_checkpoint), "the fox", "--max-tokens", "12", "--temperature", "0"])
    out, err = capsys.readouterr()
    expected = LLM(tiny_checkpoint).generate("the fox", SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    assert code == 0
    assert out == expected.text + "\n"
    assert "tokens/s" in err
    assert len(err.splitlines()) == 1


def test_json_is_one_object(tiny_checkpoint, capsys):
    options = ["--max-tokens", "9", "--seed", "4", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01"]
    assert main(["generate", str(tiny_checkpoint), "the fox", "--json", *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    llm = LLM(tiny_checkpoint)
    expected = llm.generate("the fox", SamplingParams(seed=4, top_k=20, top_p=0.9, min_p=0.01, max_tokens=9))[0]
    assert facts["prompt"] == "the fox"
    assert facts["text"] == expected.outputs[0].text
    assert facts["token_ids"] == expected.outputs[0].token_ids
    assert facts["finish_reason"] == expected.outputs[0].finish_reason
    assert facts["prompt_tokens"] == len(expected.prompt_token_ids)
    assert facts["prefill_tokens_per_s"] > 0
    assert facts["decode_tokens_per_s"] > 0


@pytest.mark.parametrize("argument", [["-"], []])
@pytest.mark.parametrize("given", [b"\xc3\xbcber\n", b"\xc3\xbcber\r\n", b"\xc3\xbcber"])
def test_prompt_from_stdin(argument, given, tiny_checkpoint, stdin, capsys):
    stdin(given)
    assert main(["generate", str(tiny_checkpoint), *argument, "--json", "--max-tokens", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "über"


def test_characters_arrive_whole(tiny_checkpoint, scripted, monkeypatch, capsys):
    scripted(["a👩‍🚀b".encode()])
    written = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (written.append(text), write(text))[1])
    assert main(["generate", str(tiny_checkpoint), "x"]) == 0
    assert [text for text in written if text not in ("", "\n")] == ["a", "👩", "\u200d", "🚀", "b"]
    assert capsys.readouterr().out == "a👩‍🚀b\n"


def test_stop_is_never_shown(tiny_checkpoint, scripted, capsys):
    scripted([b"one\ntwo\n\nthree"])
    assert main(["generate", str(tiny_checkpoint), "x", "--stop", "xyz", "--stop", "\n\nth"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--top-k", "2.5"], "--top-k"),
        (["--stop", ""], "stop is"),
        (["--devise", "cpu"], "--device"),
        (["--device", "tpu"], "tpu"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA GPU")]),
    ],
)
def test_refusals_are_one_line(options, told, tiny_checkpoint, capsys):
    assert main(["generate", str(tiny_checkpoint), "x", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert len(err.splitlines()) == 1


def test_bad_stdin_and_missing_files(tiny_checkpoint, stdin, tmp_path, capsys):
    stdin(b"abc\xff")
    assert main(["generate", str(tiny_checkpoint)]) == 2
    assert "byte 3" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "gone"), "x"]) == 2
    assert "gone" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert main(["generate", str(bare), "x"]) == 2
    assert "no tokenizer.json" in capsys.readouterr().err
