"""lm-eval, the field's evaluation harness, through its local-completions and local-chat-completions models.

Its log-likelihoods must be those of a plain forward over the same tokens: the server, its tokenizer endpoints, the
echo of prompts and the harness's arithmetic with offsets are all in between.
"""

from __future__ import annotations

import json
import os

import pytest
from served import Served

QUESTIONS = [
    {"question": "the quick", "choices": [" brown fox", " lazy dog", "漢字"], "label": 0},
    {"question": "über", "choices": [" the", " 🎉"], "label": 1},
    {"question": "jumps over", "choices": [" the lazy dog, the end.", " x"], "label": 0},
]
TASKS = {
    "fox_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "fox_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "fox_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0},
        "metric_list": [{"metric": "bypass"}],
    },
}


@pytest.fixture(scope="module")
def server(checkpoint):
    with Served(checkpoint, "--served-model-name", "tiny") as served:
        yield served


@pytest.fixture(scope="module")
def evaluate(server, tmp_path_factory):
    """evaluate(model, task, **model arguments): the samples, by document."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    (folder / "fox.jsonl").write_text("".join(json.dumps(line) + "\n" for line in QUESTIONS), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "fox.jsonl")}}}
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | data | task))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model: str, task: str, endpoint: str, chat: bool = False, **arguments) -> list[dict]:
        result = simple_evaluate(
            model=model,
            model_args={"model": "tiny", "base_url": server.url + endpoint, "max_length": 512} | arguments,
            tasks=[task],
            task_manager=tasks,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=True,
        )
        return sorted(result["samples"][task], key=lambda sample: sample["doc_id"])

    return run


def loglikelihood(model, tokenizer, context: list[int], text: str) -> float:
    """The oracle: a plain forward over context and text."""
    import torch

    ids = context + tokenizer.encode(text)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[place - 1, ids[place]].item() for place in range(len(context), len(ids)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_choices_by_likelihood(evaluate, model, tokenizer, batch_size):
    """With no tokenizer of its own: the server's is used, as it says that it has one."""
    samples = evaluate("local-completions", "fox_choice", "/v1/completions", batch_size=batch_size)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        context = tokenizer.encode(question["question"])
        expected = [loglikelihood(model, tokenizer, context, choice) for choice in question["choices"]]
        found = [float(answer[0][0]) for answer in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-3)
        assert sample["acc"] == float(max(range(len(expected)), key=expected.__getitem__) == question["label"])


def test_rolling_likelihood_with_a_tokenizer_read_by_transformers(evaluate, model, tokenizer, checkpoint):
    arguments = {"tokenizer_backend": "huggingface", "tokenizer": str(checkpoint), "num_concurrent": 3}
    samples = evaluate("local-completions", "fox_rolling", "/v1/completions", **arguments)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        expected = loglikelihood(model, tokenizer, [tokenizer.bos_id], question["question"])
        assert sample["resps"][0][0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("chat", [False, True])
def test_writing(evaluate, chat, server):
    """Greedy texts are the server's own, asked for by hand."""
    import httpx

    endpoint = "/v1/chat/completions" if chat else "/v1/completions"
    kind = "local-chat-completions" if chat else "local-completions"
    samples = evaluate(kind, "fox_writing", endpoint, chat=chat)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        asked = {"max_tokens": 12, "temperature": 0, "stop": ["\n\n"]}
        if chat:
            asked["messages"] = [{"role": "user", "content": question["question"]}]
            choice = httpx.post(server.url + endpoint, json=asked).json()["choices"][0]["message"]["content"]
        else:
            ids = httpx.post(f"{server.url}/tokenize", json={"prompt": question["question"]}).json()["tokens"]
            asked["prompt"] = ids[1:]  # the harness adds no begin token of its own
            choice = httpx.post(server.url + endpoint, json=asked).json()["choices"][0]["text"]
        assert sample["resps"][0][0] == choice
