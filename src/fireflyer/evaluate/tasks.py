"""What can be asked: each task's form of file, its prompts, its grader, and the protocols of the reports.

Prompts: MATH and AIME with the line that DeepSeek recommends for them (R1's README); multiple choice as MMLU's authors
wrote it (likelihood) and as simple-evals asks it (generation; V3's report 5.3.1 has MMLU so); HumanEval's own prompt. A
base model goes on with a text, after examples where there are any; a chat model is asked without (zero-shot).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fireflyer.config.messages import nearest
from fireflyer.data.arithmetic import format_problem, held_out_problems, read_answer, worked_answer
from fireflyer.errors import UserError
from fireflyer.evaluate.problems import (
    LETTERS,
    Item,
    Row,
    gsm8k,
    human_eval,
    multiple_choice,
    plain,
    read_items,
)

_BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
_CODE = (
    "Complete the following Python function. Answer with the whole function in one block of code.\n\n"
    "```python\n{question}\n```"
)
_SIMPLE_EVALS = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering.\n\n"
    "{question}\n\n{choices}"
)

Kind = Literal["generate", "choice", "text"]
Way = Literal["chat", "plain"]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. samples: for each problem; max_tokens: of each."""

    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    max_tokens: int = 2048


@dataclass(frozen=True)
class Task:
    """kind: answers are written, or choices or whole texts are weighed by their likelihood. form: of a row of its file,
    None where it reads no rows. grader: as `graders.open_grader` takes it. chat: the message, with {question}. plain:
    what a base model goes on with; stop: what ends its answer; shots: examples before it, where a file has some.
    """

    name: str
    kind: Kind
    what: str
    form: Callable[[Row], Item] | None = None
    grader: str = ""
    chat: str = "{question}"
    plain: str = "{question}"
    stop: tuple[str, ...] = ()
    shots: int = 0
    sampling: Sampling = Sampling()


TASKS = {
    task.name: task
    for task in (
        Task(
            "arithmetic",
            "generate",
            "the demo's 1,000 held-out problems; no file needed",
            grader="arithmetic",
            sampling=Sampling(max_tokens=len(worked_answer(1, "+", 1)) + 1),
        ),
        Task("bits-per-byte", "text", "how well a text is predicted: .txt, .md, .py, .jsonl, .parquet or a folder"),
        Task(
            "gsm8k",
            "generate",
            'GSM8K: {"question", "answer": "... #### 42"}',
            gsm8k,
            "number",
            "{question}" + _BOXED,
            "Question: {question}\nAnswer:",
            ("\n\nQuestion:", "\nQuestion:"),
            8,
        ),
        Task(
            "math-500",
            "generate",
            'MATH-500: {"problem", "answer"}',
            plain,
            "math",
            "{question}" + _BOXED,
            "Problem:\n{question}\n\nSolution:",
            ("\n\nProblem:",),
            4,
        ),
        Task(
            "aime",
            "generate",
            'AIME: {"problem", "answer"}',
            plain,
            "number",
            "{question}" + _BOXED,
            "Problem:\n{question}\n\nSolution:",
            ("\n\nProblem:",),
        ),
        Task(
            "mmlu",
            "choice",
            "MMLU by likelihood: csv, parquet or JSON lines; 5 examples from --examples",
            multiple_choice,
            shots=5,
        ),
        Task(
            "mmlu-generate",
            "generate",
            "MMLU in simple-evals' words, the letter read out of the answer",
            multiple_choice,
            "choice",
            _SIMPLE_EVALS,
            _SIMPLE_EVALS + "\n\n",
        ),
        Task("choices", "choice", 'any {"question", "choices", "answer"}, whole choices weighed', multiple_choice),
        Task(
            "humaneval",
            "generate",
            'HumanEval: {"task_id", "prompt", "entry_point", "test"}; or {"problem", "tests"}',
            human_eval,
            "code",
            _CODE,
            "{question}",
            ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        ),
        Task(
            "needle",
            "generate",
            "two words hidden in a long text, at --lengths; --data: another text to hide them in",
            grader="contains",
            stop=(".", "\n"),
            sampling=Sampling(max_tokens=32),
        ),
        Task(
            "problems",
            "generate",
            'any {"problem", "answer"}; --grader says how they are judged',
            plain,
            "math",
            "{question}",
            "{question}\n",
            ("\n\n\n",),
        ),
    )
}


PROTOCOLS: dict[str, Callable[[Task], Sampling]] = {
    "v3": lambda task: _V3_AVERAGED if task.name == "aime" else _V3_GREEDY,
    "r1": lambda task: Sampling(temperature=0.6, top_p=0.95, samples=64, max_tokens=32768),
}
"""v3: at most 8,192 tokens; AIME at temperature 0.7 over 16 runs, all else greedy (V3's report, 5.3.1). r1: temperature
0.6, top_p 0.95, 64 answers of at most 32,768 tokens (R1's README)."""

_V3_GREEDY = Sampling(max_tokens=8192)
_V3_AVERAGED = Sampling(temperature=0.7, samples=16, max_tokens=8192)


def find_task(name: str) -> Task:
    """Raises UserError with the nearest name."""
    if name in TASKS:
        return TASKS[name]
    if name.startswith("lm-eval:"):
        inner = name.removeprefix("lm-eval:") or "NAME"
        raise UserError(
            f"{name}: lm-eval runs against the server: fireflyer serve CHECKPOINT --served-model-name m, then "
            f"lm_eval --model local-completions --tasks {inner} --model_args "
            "model=m,base_url=http://127.0.0.1:8000/v1/completions (see docs/serve.md)"
        )
    guess = nearest(name, TASKS)
    raise UserError(
        f"unknown task {name!r}; " + (f"did you mean {guess}? " if guess else "") + f"Tasks: {', '.join(TASKS)}"
    )


def protocol_sampling(protocol: str | None, task: Task) -> Sampling:
    """Of a task's answers under a protocol (None: the task's own). Tasks that bring their problems keep theirs."""
    if protocol is None or task.form is None:
        return task.sampling
    return PROTOCOLS[protocol](task)


def task_items(task: Task, path: Path | None, seed: int) -> list[Item]:
    """The problems. Raises UserError."""
    if task.name == "arithmetic":
        if path is not None:
            raise UserError(f"--data {path}: arithmetic brings its own problems; leave it out")
        return [
            Item(format_problem(*p), format_problem(*p), {"problem": format_problem(*p), "answer": str(p.result)})
            for p in held_out_problems(seed)
        ]
    if path is None:
        raise UserError(f"{task.name} needs a file: --data {task.name}=FILE; its form is {task.what}")
    assert task.form is not None
    return read_items(path, task.form)


def prompt(task: Task, item: Item, way: Way, examples: Sequence[Item]) -> str:
    """What the model is shown: a user's message, or a text to go on with (after the examples)."""
    form = task.chat if way == "chat" else task.plain
    shown = [_filled(form, example) + _shown_solution(task, example) + "\n\n" for example in examples]
    return "".join(shown) + _filled(form, item)


def choice_texts(task: Task, item: Item, examples: Sequence[Item]) -> tuple[str, list[str]]:
    """(context, continuations) of a multiple choice. MMLU weighs the letters, "choices" the choices themselves."""
    if task.name == "choices":
        return item.question, [choice if choice[:1].isspace() else f" {choice}" for choice in item.choices]
    about = f" about {item.subject}" if item.subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    shown = [f"{_lettered(example)}\nAnswer: {LETTERS[example.label]}\n\n" for example in examples]
    letters = [f" {letter}" for letter in LETTERS[: len(item.choices)]]
    return head + "".join(shown) + f"{_lettered(item)}\nAnswer:", letters


def examples_for(task: Task, item: Item, pool: Sequence[Item], shots: int) -> list[Item]:
    """The first `shots` of the pool, of the item's own subject where the pool knows it, and never the item itself."""
    same = [example for example in pool if example.subject == item.subject] or list(pool)
    return [example for example in same if example.question != item.question][:shots]


def read_arithmetic(text: str) -> str:
    """The result of a worked answer, "" if it doesn't end in one."""
    found = read_answer(text)
    return "" if found is None else str(found)


def _filled(form: str, item: Item) -> str:
    choices = "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))
    letters = LETTERS[: len(item.choices)]
    texts = {"letters": letters, "choices": choices, "question": item.question}
    # Not str.format: prompts and questions are full of other braces.
    return re.sub(r"\{(letters|choices|question)\}", lambda name: texts[name[1]], form)


def _shown_solution(task: Task, item: Item) -> str:
    return (" " if task.plain.endswith(":") else "") + item.solution


def _lettered(item: Item) -> str:
    return "\n".join(
        [item.question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False))]
    )
