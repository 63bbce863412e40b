"""Answers written by the engine, graded as they come.

In: prompts as token ids. Out: one record a problem, as soon as all its samples are there; the engine decodes as many
together as it holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fireflyer.evaluate.graders import Grade, Grader
from fireflyer.evaluate.problems import Item
from fireflyer.evaluate.tasks import Sampling, read_arithmetic
from fireflyer.infer.llm import LLM
from fireflyer.infer.request import Request
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.text.special_tokens import THINK_BEGIN

_GRADED_TOGETHER = 32


class ArithmeticGrader:
    """The demo's own: the nine digits that a worked answer ends in."""

    name = "arithmetic"

    def grade(self, problems: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[Grade]:
        grades = []
        for problem, text in zip(problems, texts, strict=True):
            found = read_arithmetic(text)
            right = found == problem["answer"]
            grades.append(Grade(float(right), right, "" if found else "no result at the end", found))
        return grades

    def close(self) -> None:
        """Nothing is open."""


def written_records(
    llm: LLM,
    items: Sequence[tuple[int, Item, list[int]]],
    grader: Grader,
    sampling: Sampling,
    stop: Sequence[str],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """(number, problem, prompt) each; records in the order in which they end, with the keys of a samples file.

    The n-th problem's draws follow from seed and n alone, so what is left of an evaluation gives what all would have.
    """
    waiting: list[tuple[int, Item, Request]] = []
    for number, item, token_ids in items:
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            n=sampling.samples,
            seed=(seed << 32) + number,
            stop=tuple(stop),
        )
        waiting.append((number, item, llm.make_request(token_ids, params)))
    ended: list[tuple[int, Item, Request]] = []
    try:
        with llm.lock:
            for _, _, request in waiting:
                llm.engine.add(request)
        while waiting:
            with llm.lock:
                llm.engine.step()
            ended += [entry for entry in waiting if entry[2].finished]
            waiting = [entry for entry in waiting if not entry[2].finished]
            if ended and (len(ended) >= _GRADED_TOGETHER or not waiting):
                yield from _graded(llm, ended, grader)
                ended = []
    finally:
        with llm.lock:
            for _, _, request in waiting:
                llm.engine.abort(request.request_id)


def _graded(llm: LLM, ended: Sequence[tuple[int, Item, Request]], grader: Grader) -> Iterator[dict[str, Any]]:
    outputs = [request.output() for _, _, request in ended]
    opened = [_opened_thinking(llm, output.prompt_token_ids) for output in outputs]
    problems = [item.problem for (_, item, _), output in zip(ended, outputs, strict=True) for _ in output.outputs]
    texts = [
        opening + answer.text for opening, output in zip(opened, outputs, strict=True) for answer in output.outputs
    ]
    grades = iter(grader.grade(problems, texts))
    for (number, item, _), output in zip(ended, outputs, strict=True):
        samples = []
        for answer in output.outputs:
            grade = next(grades)
            correct = bool(grade.correct) if grade.correct is not None else grade.reward >= 1.0
            failed = answer.finish_reason == "error"
            samples.append(
                {
                    "text": answer.text,
                    "tokens": len(answer.token_ids),
                    "finish_reason": answer.finish_reason,
                    "answer": grade.answer,
                    "reward": 0.0 if failed else grade.reward,
                    "correct": correct and not failed,
                    "note": str(answer.error) if failed else grade.note,
                }
            )
        yield {
            "number": number,
            "id": item.id,
            "expected": item.problem.get("answer"),
            "prompt": llm.tokenizer.decode(output.prompt_token_ids, skip_special=False) if llm.tokenizer else "",
            "samples": samples,
        }


def _opened_thinking(llm: LLM, prompt: Sequence[int]) -> str:
    """The mark that the prompt already holds: an answer that never closes it has not come to an end."""
    if llm.tokenizer is None:
        return ""
    text = llm.tokenizer.decode(prompt, skip_special=False)
    return THINK_BEGIN if llm.tokenizer.dialect.starts_in_thinking(text) else ""
