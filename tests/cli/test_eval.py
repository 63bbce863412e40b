"""`fireflyer eval`: scores that follow from the answers, folders that are never overwritten, refusals in one line."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from fireflyer import LLM, SamplingParams
from fireflyer.cli.main import main
from fireflyer.evaluate import evaluation


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(capsys, checkpoint, *options) -> dict:
    assert main(["eval", str(checkpoint), "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def records(results, task):
    lines = (Path(results["out"]) / f"{task}.samples.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted(map(json.loads, lines), key=lambda record: record["number"])


PROBLEMS = [{"problem": f"the quick {number}", "answer": str(number)} for number in range(6)]


def test_answers_are_the_engines_own_and_all_is_kept(tiny_checkpoint, here, capsys):
    data = write(here / "p.jsonl", *PROBLEMS)
    options = ["--tasks", "problems", "--grader", "number", "--data", data, "--max-tokens", 8]
    results = evaluate(capsys, tiny_checkpoint, *options)
    expected = LLM(tiny_checkpoint).generate(
        [f"the quick {number}\n" for number in range(6)],
        SamplingParams(temperature=0, max_tokens=8, stop=["\n\n\n"]),
    )
    found = records(results, "problems")
    assert [record["samples"][0]["text"] for record in found] == [output.outputs[0].text for output in expected]
    assert results["tasks"]["problems"]["accuracy"]["value"] == sum(r["samples"][0]["correct"] for r in found) / 6
    settings = json.loads((here / results["out"] / "settings.json").read_text())
    task = settings["tasks"]["problems"]
    assert task["data"]["path"] == str(data)
    assert task["sampling"] == {"temperature": 0.0, "top_p": 1.0, "samples": 1, "max_tokens": 8}
    assert task["prompt"] == {"way": "plain", "form": "{question}\n"}
    assert settings["software"]["torch"] == torch.__version__
    assert len(settings["checkpoint"]["sha256"]) == 64
    assert found[0]["prompt"].endswith("the quick 0\n")


def test_samples_and_ks(tiny_checkpoint, here, capsys):
    """Scores recomputed from the records; the same draws whatever is decoded beside them."""
    data = write(here / "p.jsonl", *PROBLEMS)
    options = ["--tasks", "problems", "--grader", "number", "--data", data, "--max-tokens", 12]
    options += ["--samples", 4, "--temperature", 1, "--k", "1,4"]
    results = evaluate(capsys, tiny_checkpoint, *options)
    scores = results["tasks"]["problems"]
    right = [[sample["correct"] for sample in record["samples"]] for record in records(results, "problems")]
    assert scores["accuracy"]["value"] == pytest.approx(sum(map(sum, right)) / 24)
    assert scores["pass@1"]["value"] == pytest.approx(scores["accuracy"]["value"])
    assert scores["pass@4"]["value"] == pytest.approx(sum(map(any, right)) / 6)
    alone = evaluate(capsys, tiny_checkpoint, *options, "--batch", 1, "--out", here / "alone")
    assert records(alone, "problems") == records(results, "problems")


def test_multiple_choice_and_bits_per_byte(tiny_checkpoint, here, capsys):
    """Against a plain forward over each sequence."""
    rows = [{"question": "the quick", "choices": ["brown fox", "lazy"], "answer": n % 2} for n in range(4)]
    write(here / "c.jsonl", *rows)
    (here / "t.txt").write_text("the quick brown fox, über")
    data = ["--data", "choices=c.jsonl", "--data", "bits-per-byte=t.txt"]
    results = evaluate(capsys, tiny_checkpoint, "--tasks", "choices,bits-per-byte", *data)
    llm = LLM(tiny_checkpoint)

    def logprob(text: str, after: int) -> float:
        ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode(text)]
        with torch.no_grad():
            logprobs = llm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logprobs[place - 1, ids[place]].item() for place in range(after + 1, len(ids)))

    context = len(llm.tokenizer.encode("the quick"))
    expected = [logprob(f"the quick {choice}", context) for choice in ("brown fox", "lazy")]
    for record in records(results, "choices"):
        assert record["logprobs"] == pytest.approx(expected, abs=1e-4)
    assert results["tasks"]["choices"]["accuracy"]["value"] == 0.5
    bits = -logprob("the quick brown fox, über", 0) / math.log(2) / len("the quick brown fox, über".encode())
    assert results["tasks"]["bits-per-byte"]["bits_per_byte"]["value"] == pytest.approx(bits, abs=1e-4)


def test_the_reports_protocols(tiny_checkpoint, here, capsys):
    write(here / "a.jsonl", {"problem": "the", "answer": "1"})
    both = ["--tasks", "aime,math-500", "--data", "aime=a.jsonl", "--data", "math-500=a.jsonl"]
    short = ["--max-tokens", "4", "--batch", "64"]
    results = evaluate(capsys, tiny_checkpoint, *both, "--protocol", "v3", *short)
    settings = json.loads((here / results["out"] / "settings.json").read_text())["tasks"]
    assert settings["aime"]["sampling"] == {"temperature": 0.7, "top_p": 1.0, "samples": 16, "max_tokens": 4}
    assert settings["math-500"]["sampling"] == {"temperature": 0.0, "top_p": 1.0, "samples": 1, "max_tokens": 4}
    from fireflyer.evaluate.tasks import TASKS, Sampling, protocol_sampling

    assert protocol_sampling("v3", TASKS["aime"]).max_tokens == 8192
    assert protocol_sampling("r1", TASKS["math-500"]) == Sampling(0.6, 0.95, 64, 32768)


def test_the_needle_s_map_lies_in_the_folder(tiny_checkpoint, here, capsys):
    results = evaluate(capsys, tiny_checkpoint, "--tasks", "needle", "--lengths", "200,300", "--max-tokens", 3)
    assert len(results["tasks"]["needle"]["map"]) == 10
    assert (here / results["out"] / "needle.svg").read_text().startswith("<svg")
    assert all("secret words" in record["prompt"] for record in records(results, "needle"))


def test_stopped_and_gone_on_with(tiny_checkpoint, here, capsys, monkeypatch):
    """The records of a stopped evaluation, a torn line after them, are kept; the scores are those of a whole one."""
    data = write(here / "c.jsonl", *[{"question": "the", "choices": ["quick", "x"], "answer": n % 2} for n in range(5)])
    options = ["--tasks", "choices", "--data", data]
    whole = evaluate(capsys, tiny_checkpoint, *options, "--out", "whole")
    real = evaluation._choice_records

    def interrupted(llm, tokenizer, prepared, missing):
        for index, record in enumerate(real(llm, tokenizer, prepared, missing)):
            if index == 3:
                signal.raise_signal(signal.SIGTERM)
            yield record

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "_choice_records", interrupted)
        assert main(["eval", str(tiny_checkpoint), *map(str, options), "--out", "part"]) == 75
    assert "goes on from there" in capsys.readouterr().err
    with (here / "part" / "choices.samples.jsonl").open("a") as file:
        file.write('{"number": 3, "cor')
    asked = []
    monkeypatch.setattr(
        evaluation, "_choice_records", lambda llm, t, p, missing: asked.append(missing) or real(llm, t, p, missing)
    )
    part = evaluate(capsys, tiny_checkpoint, *options, "--out", "part")
    assert asked == [[3, 4]]
    assert part["tasks"] == whole["tasks"]
    assert records(part, "choices") == records(whole, "choices")
    assert evaluate(capsys, tiny_checkpoint, *options, "--out", "part") == part


def test_another_checkpoint_or_setting_is_refused(tiny_checkpoint, here, capsys):
    data = write(here / "p.jsonl", *PROBLEMS[:1])
    options = ["--tasks", "problems", "--grader", "exact", "--data", str(data), "--max-tokens", "2", "--out", "same"]
    evaluate(capsys, tiny_checkpoint, *options)
    before = (here / "same" / "results.json").read_bytes()
    assert main(["eval", str(tiny_checkpoint), *options[:-4], "--max-tokens", "3", "--out", "same"]) == 2
    assert "another tasks.problems.sampling.max_tokens (2, now 3)" in capsys.readouterr().err
    other = here / "other"
    shutil.copytree(tiny_checkpoint, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 50000.0}))
    assert main(["eval", str(other), *options]) == 2
    assert "another checkpoint" in capsys.readouterr().err
    assert (here / "same" / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks", "gsm"], "did you mean gsm8k"),
        ([], "name what to score with --tasks"),
        (["--tasks", "gsm8k"], "gsm8k needs a file: --data gsm8k=FILE"),
        (["--tasks", "gsm8k", "--data", "nowhere.jsonl"], "no such file"),
        (["--tasks", "gsm8k", "--data", "p.jsonl"], "p.jsonl, line 2: the answer 'none' has no number"),
        (["--tasks", "arithmetic", "--k", "4"], "--k 4: arithmetic has 1 sample a problem"),
        (["--tasks", "arithmetic", "--samples", "4"], "samples at temperature 0 would all be the same"),
        (["--tasks", "arithmetic", "--k", "x"], "whole numbers"),
        (["--tasks", "arithmetic", "--limit", "0"], "--limit is 0"),
        (["--tasks", "gsm8k,aime", "--data", "p.jsonl"], "say which task it is for"),
        (["--tasks", "gsm8k", "--data", "aime=p.jsonl"], "aime is not among --tasks"),
        (["--tasks", "gsm8k", "--data", "good.jsonl", "--shots", "2"], "needs --examples gsm8k=FILE"),
        (["--tasks", "problems", "--data", "good.jsonl", "--grader", "maths"], "did you mean math"),
        (["--tasks", "needle", "--lengths", "99999"], "--lengths 99999: the model's context is 50,000"),
        (["--tasks", "arithmetic", "--lengths", "99"], "is for the task needle"),
        (["--tasks", "lm-eval:piqa"], "--tasks piqa"),
        (["--tasks", "arithmetic", "--grader", "exact"], "is for the task problems"),
    ],
)
def test_refusals_write_nothing(tiny_checkpoint, here, capsys, options, reason):
    write(here / "p.jsonl", {"question": "?", "answer": "1"}, {"question": "?", "answer": "none"})
    write(here / "good.jsonl", {"question": "?", "answer": "#### 1"})
    before = sorted(here.rglob("*"))
    assert main(["eval", str(tiny_checkpoint), *options]) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert sorted(here.rglob("*")) == before


def test_a_chat_needs_a_template(tiny_checkpoint, here, capsys):
    from fireflyer.text.tokenizer import Tokenizer

    folder = here / "plain"
    shutil.copytree(tiny_checkpoint, folder)
    # A vocabulary without the marks of turns has no template of its own either.
    text = json.dumps(json.loads((folder / "tokenizer.json").read_text())).replace("Assistant", "Helper")
    (folder / "tokenizer.json").write_text(text)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert Tokenizer.from_file(folder).chat_template is None
    write(here / "p.jsonl", *PROBLEMS)
    assert main(["eval", str(folder), "--tasks", "math-500", "--data", "p.jsonl", "--prompt", "chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_taught_model_is_asked_in_its_template(tiny_checkpoint, here, capsys):
    from fireflyer.text.tokenizer import Tokenizer

    folder = here / "taught"
    shutil.copytree(tiny_checkpoint, folder)
    Tokenizer.from_file(folder).of_taught_model().save(folder)
    data = write(here / "p.jsonl", *PROBLEMS[:2])
    options = ["--tasks", "math-500", "--data", data, "--max-tokens", "4"]
    results = evaluate(capsys, folder, *options)
    shown = records(results, "math-500")[0]["prompt"]
    assert "<｜User｜>the quick" in shown
    assert shown.endswith("<｜Assistant｜>") or "<think>" in shown
    assert "\\boxed{}" in shown
