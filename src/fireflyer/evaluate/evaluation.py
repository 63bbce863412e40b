"""An evaluation: a model, prepared tasks and a folder in; a line a problem and scores with intervals out.

Records that the folder has already are kept, so a stopped evaluation goes on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from fireflyer.evaluate.choices import ContinuationScorer, document_logprob, encode_continuation
from fireflyer.evaluate.generation import ArithmeticGrader, written_records
from fireflyer.evaluate.graders import Graders
from fireflyer.evaluate.needle import needle_map, needle_svg
from fireflyer.evaluate.prepare import Prepared, prompt_ids, stop_texts
from fireflyer.evaluate.records import EvaluationFolder
from fireflyer.evaluate.scores import Score, majority_at_k, pass_at_k, score
from fireflyer.evaluate.tasks import choice_texts, examples_for
from fireflyer.infer.llm import LLM
from fireflyer.text.tokenizer import Tokenizer

Record = dict[str, Any]


@dataclass(frozen=True)
class Progress:
    """A problem is done: `done` of `total` of a task, and the mean of its score so far."""

    task: str
    done: int
    total: int
    mean: float


def evaluate_task(
    llm: LLM,
    tokenizer: Tokenizer,
    prepared: Prepared,
    folder: EvaluationFolder,
    graders: Graders,
    *,
    seed: int = 0,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Ask what isn't answered yet, and score it all."""
    name = prepared.task.name
    records = folder.records(name)
    values = [_main_value(prepared, record) for record in records.values()]
    missing = [number for number in range(prepared.total) if number not in records]
    for record in _records(llm, tokenizer, prepared, missing, graders, seed):
        folder.add(name, record)
        records[record["number"]] = record
        values.append(_main_value(prepared, record))
        on_progress(Progress(name, len(records), prepared.total, mean(values)))
    summary = summarise(prepared, [records[number] for number in sorted(records)])
    if "map" in summary:
        folder.write("needle.svg", needle_svg(summary["map"], "found, by tokens of the text and depth of the needle"))
    return summary


def summarise(prepared: Prepared, records: Sequence[Record]) -> dict[str, Any]:
    """Scores of all records of a task, with their intervals."""
    kind = prepared.task.kind
    if kind == "text":
        return _summarise_text(records)
    return _summarise_choices(records) if kind == "choice" else _summarise_written(prepared, records)


def _records(
    llm: LLM, tokenizer: Tokenizer, prepared: Prepared, missing: Sequence[int], graders: Graders, seed: int
) -> Iterator[Record]:
    if prepared.task.kind == "text":
        return _text_records(llm, tokenizer, prepared, missing)
    if prepared.task.kind == "choice":
        return _choice_records(llm, tokenizer, prepared, missing)
    grader = ArithmeticGrader() if prepared.task.grader == "arithmetic" else graders.get(prepared.task.grader)
    asked = []
    for number in missing:
        item = prepared.items[number]
        examples = examples_for(prepared.task, item, prepared.examples, prepared.shots)
        asked.append((number, item, prompt_ids(prepared, item, examples, tokenizer)))
    return written_records(llm, asked, grader, prepared.sampling, stop_texts(prepared), seed)


def _choice_records(llm: LLM, tokenizer: Tokenizer, prepared: Prepared, missing: Sequence[int]) -> Iterator[Record]:
    scorer = ContinuationScorer(llm.model, llm.max_length)
    for number in missing:
        item = prepared.items[number]
        examples = examples_for(prepared.task, item, prepared.examples, prepared.shots)
        context, texts = choice_texts(prepared.task, item, examples)
        encoded = [encode_continuation(tokenizer, context, text) for text in texts]
        logprobs = scorer.score(encoded[0][0], [ids for _, ids in encoded])
        lengths = [len(text.strip()) for text in texts]
        normalised = [logprob / length for logprob, length in zip(logprobs, lengths, strict=True)]
        yield {
            "number": number,
            "id": item.id,
            "subject": item.subject,
            "prompt": context,
            "choices": texts,
            "label": item.label,
            "logprobs": logprobs,
            "correct": _first_largest(logprobs) == item.label,
            "correct_normalised": _first_largest(normalised) == item.label,
        }


def _text_records(llm: LLM, tokenizer: Tokenizer, prepared: Prepared, missing: Sequence[int]) -> Iterator[Record]:
    documents = prepared.documents
    assert documents is not None
    for number in missing:
        parts = [documents.read(number, part).text for part in range(documents.num_parts(number))]
        tokens = [token for part in parts for token in tokenizer.encode(part)]
        num_bytes = sum(len(part.encode("utf-8")) for part in parts)
        logprob = document_logprob(llm.model, tokens, tokenizer.bos_id, llm.max_length - 1)
        yield {"number": number, "tokens": len(tokens), "bytes": num_bytes, "logprob": logprob}


def _main_value(prepared: Prepared, record: Record) -> float:
    if prepared.task.kind == "text":
        return _bits(record)
    if prepared.task.kind == "choice":
        return float(record["correct"])
    return mean(float(sample["correct"]) for sample in record["samples"])


def _bits(record: Record) -> float:
    return -record["logprob"] / math.log(2) / record["bytes"]


def _summarise_text(records: Sequence[Record]) -> dict[str, Any]:
    weights = [float(record["bytes"]) for record in records]
    return {
        "bits_per_byte": asdict(score([_bits(record) for record in records], weights)),
        "tokens": sum(record["tokens"] for record in records),
        "bytes": sum(record["bytes"] for record in records),
    }


def _summarise_choices(records: Sequence[Record]) -> dict[str, Any]:
    subjects = sorted({record["subject"] for record in records} - {""})
    return {
        "accuracy": asdict(score([float(record["correct"]) for record in records])),
        "accuracy_normalised": asdict(score([float(record["correct_normalised"]) for record in records])),
        "subjects": {
            subject: mean(float(record["correct"]) for record in records if record["subject"] == subject)
            for subject in subjects
        },
    }


def _summarise_written(prepared: Prepared, records: Sequence[Record]) -> dict[str, Any]:
    samples = [sample for record in records for sample in record["samples"]]
    right = [[bool(sample["correct"]) for sample in record["samples"]] for record in records]
    scores: dict[str, Score] = {"accuracy": score([mean(map(float, each)) for each in right])}
    for k in prepared.ks:
        scores[f"pass@{k}"] = score([pass_at_k(sum(each), len(each), k) for each in right])
        if prepared.task.grader != "code":  # programs are no answers that could be counted
            answers = [[sample["answer"] for sample in record["samples"]] for record in records]
            votes = [majority_at_k(a, r, k) for a, r in zip(answers, right, strict=True)]
            scores[f"maj@{k}"] = score(votes)
    rewards = [mean(sample["reward"] for sample in record["samples"]) for record in records]
    if any(reward != mean(map(float, each)) for reward, each in zip(rewards, right, strict=True)):
        scores["reward"] = score(rewards)
    notes = [sample["note"] for sample in samples if sample["note"]]
    return {
        **{name: asdict(value) for name, value in scores.items()},
        "samples": len(samples),
        "mean_tokens": mean(sample["tokens"] for sample in samples),
        "cut_short": mean(float(sample["finish_reason"] == "length") for sample in samples),
        **({"map": needle_map(prepared.items, records)} if prepared.task.name == "needle" else {}),
        "notes": {note: notes.count(note) for note in sorted(set(notes), key=notes.count, reverse=True)[:5]},
    }


def _first_largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
