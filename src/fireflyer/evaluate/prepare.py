"""What a user asks of a checkpoint, made into tasks with their problems and settings.

Everything that options or files can be wrong in is found here, before the model is asked anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fireflyer.data.documents import FileDocuments, find_files
from fireflyer.data.files import ReadOptions
from fireflyer.errors import UserError
from fireflyer.evaluate.identity import data_identity
from fireflyer.evaluate.needle import needle_items
from fireflyer.evaluate.problems import Item
from fireflyer.evaluate.tasks import Sampling, Task, Way, prompt, protocol_sampling, task_items
from fireflyer.text.templates import CHAT_TEMPLATE
from fireflyer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Asked:
    """Of all tasks; None: what the task or the protocol has.

    ks: of pass@k and maj@k. seed: of needles; problem_seed: of the run, which says what arithmetic it never saw.
    limit: only the first so many problems. lengths: of needle's prompts, in tokens; needles: of each length and depth.
    prompt: "auto" is chat for a model that was taught it. data, examples: files, by the task's name.
    """

    protocol: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    samples: int | None = None
    max_tokens: int | None = None
    ks: tuple[int, ...] = ()
    seed: int = 0
    problem_seed: int = 0
    limit: int | None = None
    shots: int | None = None
    prompt: Literal["auto", "chat", "plain"] = "auto"
    grader: str | None = None
    lengths: tuple[int, ...] = (1024, 2048, 4096)
    needles: int = 1
    data: Mapping[str, Path] = field(default_factory=dict)
    examples: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Prepared:
    """A task ready to be asked. documents: instead of items, where whole texts are weighed."""

    task: Task
    items: list[Item]
    examples: list[Item]
    shots: int
    way: Way
    sampling: Sampling
    ks: tuple[int, ...]
    documents: FileDocuments | None
    settings: dict[str, Any]

    @property
    def total(self) -> int:
        return len(self.items) if self.documents is None else min(self.documents.num_documents, self._limit)

    @property
    def _limit(self) -> int:
        return self.settings["limit"] or 2**62


def prepare(task: Task, asked: Asked, tokenizer: Tokenizer) -> Prepared:
    """Raises UserError for what can't be honoured, with row and reason where it lies in a file."""
    path, examples_path = asked.data.get(task.name), asked.examples.get(task.name)
    if asked.grader is not None and task.name == "problems":
        task = replace(task, grader=asked.grader)
    sampling, ks = _sampling(task, asked), asked.ks if task.kind == "generate" else ()
    too_large = [k for k in ks if k > sampling.samples]
    if too_large:
        raise UserError(
            f"--k {too_large[0]}: {task.name} has {sampling.samples} sample{'s' * (sampling.samples > 1)} a problem;"
            f" add --samples {max(ks)}"
        )
    way = _way(task, asked, tokenizer)
    items: list[Item] = []
    documents = None
    if task.kind == "text":
        if path is None:
            raise UserError(f"{task.name} needs a file: --data {task.name}=FILE; {task.what}")
        documents = FileDocuments(str(path), find_files(path), ReadOptions())
    elif task.name == "needle":
        items = needle_items(tokenizer, way, asked.lengths, path, asked.seed, asked.needles)[: asked.limit]
    else:
        items = task_items(task, path, asked.problem_seed)[: asked.limit]
    pool, shots = _examples(task, asked, examples_path, way)
    settings = {
        "task": task.name,
        "data": None if path is None else {"path": str(path), "sha256": data_identity(path)},
        "examples": None if not pool else {"path": str(examples_path), "sha256": data_identity(_there(examples_path))},
        "problem_seed": asked.problem_seed if task.name == "arithmetic" else None,
        "lengths": list(asked.lengths) if task.name == "needle" else None,
        "needles": asked.needles if task.name == "needle" else None,
        "limit": asked.limit,
        "shots": shots,
        "prompt": {"way": way, "form": task.chat if way == "chat" else task.plain} if task.kind == "generate" else None,
        "stop": list(_stop(task, way)),
        "grader": task.grader,
        "grader_sha256": data_identity(Path(task.grader)) if task.grader.endswith(".py") else None,
        "sampling": asdict(sampling) if task.kind == "generate" else None,
        "k": list(ks),
    }
    return Prepared(task, items, pool, shots, way, sampling, ks, documents, settings)


def prompt_ids(prepared: Prepared, item: Item, examples: list[Item], tokenizer: Tokenizer) -> list[int]:
    """What the model is fed, as token ids. Control tokens that a question spells out are plain text."""
    text = prompt(prepared.task, item, prepared.way, examples)
    if prepared.way == "chat":
        return tokenizer.encode_chat([{"role": "user", "content": text}])
    return tokenizer.encode(text, bos=True)


def stop_texts(prepared: Prepared) -> tuple[str, ...]:
    """What ends an answer besides the end token."""
    return _stop(prepared.task, prepared.way)


def template_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """The chat template, for the record."""
    template = tokenizer.chat_template
    if template is None:
        return {"sha256": None, "text": None}
    return {"sha256": hashlib.sha256(template.encode()).hexdigest(), "text": template}


def _stop(task: Task, way: Way) -> tuple[str, ...]:
    return task.stop if way == "plain" else ()


def _there(path: Path | None) -> Path:
    assert path is not None
    return path


def _sampling(task: Task, asked: Asked) -> Sampling:
    base = protocol_sampling(asked.protocol, task)
    fields = ("temperature", "top_p", "samples", "max_tokens")
    given = {name: getattr(asked, name) for name in fields if getattr(asked, name) is not None}
    chosen = replace(base, **given)
    if chosen.samples > 1 and chosen.temperature == 0:
        raise UserError(
            f"{task.name}: {chosen.samples} samples at temperature 0 would all be the same; add --temperature 0.6, say"
        )
    return chosen


def _way(task: Task, asked: Asked, tokenizer: Tokenizer) -> Way:
    if task.kind != "generate" or task.name == "arithmetic":
        return "plain"
    if asked.prompt == "chat" and tokenizer.chat_template is None:
        raise UserError(f"--prompt chat: this checkpoint has no chat template, which {task.name} needs; use plain")
    if asked.prompt != "auto":
        return asked.prompt
    # Every tokenizer trained here ships a template; the mark of post-training says whether the model knows it.
    taught = tokenizer.taught_chat or tokenizer.chat_template not in (None, CHAT_TEMPLATE)
    return "chat" if taught else "plain"


def _examples(task: Task, asked: Asked, path: Path | None, way: Way) -> tuple[list[Item], int]:
    if path is None:
        if asked.shots and task.shots:
            raise UserError(f"--shots {asked.shots}: {task.name} needs --examples {task.name}=FILE to take them from")
        return [], 0
    if way == "chat":
        raise UserError(f"--examples {path}: a chat is asked without examples (zero-shot); add --prompt plain")
    if task.form is None or not task.shots:
        raise UserError(f"--examples {path}: {task.name} takes no examples; leave it out")
    return task_items(task, path, asked.problem_seed), task.shots if asked.shots is None else asked.shots
