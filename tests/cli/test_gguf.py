"""The verbs take a GGUF file where they take a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf_files import WIDTHS, write_gguf
from published_models import own_model

from fireflyer import LLM, SamplingParams, load_model, save_model
from fireflyer.cli.main import main
from fireflyer.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file, and the folder with the same weights and tokenizer."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = Tokenizer.train(["the river and the stone " * 20], 290)
    model = own_model(**{**WIDTHS, "vocab_size": tokenizer.vocab_size}, num_hidden_layers=2)
    parsed = json.loads(_json(tokenizer, folder))
    by_id = {i: token for token, i in parsed["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in parsed["added_tokens"]}
    added = {token["id"] for token in parsed["added_tokens"]}
    write_gguf(
        folder / "x.gguf",
        model,
        tokenizer_model="gpt2",
        tokenizer_pre="deepseek-v3",
        token_list=[by_id[i] for i in range(len(by_id))],
        token_types=[3 if i in added else 1 for i in range(len(by_id))],
        token_merges=[" ".join(merge) for merge in parsed["model"]["merges"]],
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        chat_template=tokenizer.chat_template,
    )
    model.config = model.config.replace(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    save_model(model, folder / "plain", tokenizer_from=folder / "tokenizer")
    return folder


def _json(tokenizer: Tokenizer, folder: Path) -> str:
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    return (folder / "tokenizer" / "tokenizer.json").read_text("utf-8")


def test_answers_are_those_of_the_same_weights(folder: Path) -> None:
    ours, plain = LLM(folder / "x.gguf"), LLM(folder / "plain")
    params = SamplingParams(max_tokens=12, temperature=0.0)
    messages = [{"role": "user", "content": "the stone"}]
    for ask in (lambda llm: llm.generate("the river", params), lambda llm: llm.chat(messages, params)):
        assert ask(ours)[0].outputs[0].token_ids == ask(plain)[0].outputs[0].token_ids


def test_verbs(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(folder / "x.gguf")
    assert main(["inspect", path, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["parameters"]
    assert main(["inspect", str(folder / "plain"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == counts
    assert main(["generate", path, "the river", "--max-tokens", "3", "--temperature", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 3
    assert main(["export", path, str(tmp_path / "out")]) == 0
    exported = load_model(tmp_path / "out")
    assert torch.equal(exported.lm_head.weight, load_model(folder / "plain").lm_head.weight)
    ids = [Tokenizer.from_file(place).encode("the stone") for place in (tmp_path / "out", folder / "plain")]
    assert ids[0] == ids[1]
