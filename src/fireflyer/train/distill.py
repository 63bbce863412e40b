"""Distillation as R1's (2.4): a teacher answers problems, graders keep what is right, a student learns it.

In: a recipe with [distill] and `init_from`, the student. Out: a run of the one loop whose sequences are kept answers.
Before it begins the folder gets `answers.jsonl`, all that the teacher wrote; `kept.jsonl`, what is learnt, for people
to read; and `teacher.json`, whose answers they are. Both stages go on where they were stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from fireflyer.checkpoint.hf import load_tokenizer
from fireflyer.checkpoint.published import resolve_checkpoint
from fireflyer.checkpoint.run import write_text
from fireflyer.checkpoint.run_folder import SUMMARY, RunLock, writing
from fireflyer.data.chats import ChatLoader, pad_token
from fireflyer.errors import Stopped, UserError
from fireflyer.evaluate.identity import checkpoint_identity
from fireflyer.infer.llm import LLM
from fireflyer.model.decoder import Decoder
from fireflyer.parallel.started import world_size
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.environments import Environment, open_environment
from fireflyer.train.events import Event, Notice
from fireflyer.train.grpo_run import examine
from fireflyer.train.lessons import Counts, Lesson, Lessons, advice
from fireflyer.train.loop import train
from fireflyer.train.objective import Evaluation
from fireflyer.train.post_training_settings import DistillSettings
from fireflyer.train.pretraining import Pretraining
from fireflyer.train.prompts import PromptForm, check_problems, prompt_form
from fireflyer.train.recipe import take_stored_choices, with_epoch_tokens
from fireflyer.train.rollout import Rollouts
from fireflyer.train.settings import Recipe
from fireflyer.train.setup import Inputs, check_folder, choose, lay_out
from fireflyer.train.sft import check_post_training, taught_tokenizer
from fireflyer.train.summary import Summary, finished_summary
from fireflyer.train.teacher import ANSWERS, Gathered, Gathering, problem_numbers
from fireflyer.train.threads import use_threads

KEPT, TEACHER = "kept.jsonl", "teacher.json"


def distill(
    recipe: Recipe,
    run_dir: str | Path,
    *,
    on_event: Callable[[Event | Gathered], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Summary, Counts]:
    """Ask the teacher, keep what is right, teach the student; or go on with it. summary.json has the counts too.

    Raises UserError for what is wrong with the recipe, and where no answer could be kept; Stopped once all is saved.
    """
    run_dir = Path(run_dir)
    stored = check_folder(recipe, run_dir)
    if stored is not None and finished_summary(run_dir, recipe) is not None and (counts := _read_counts(run_dir)):
        return train(recipe, run_dir, on_event=on_event), counts
    work = _Work(recipe, run_dir, stored)
    try:
        work.check(on_event)
        work.gather(on_event, should_stop)
        summary = train(recipe, run_dir, opener=work.open_lessons, on_event=on_event, should_stop=should_stop)
    finally:
        work.environment.close()
    _write_counts(run_dir, work.counts)
    return summary, work.counts


class Distillation(Pretraining):
    """Fine-tuning on a teacher's answers; the student is examined on the held-out problems."""

    def __init__(
        self,
        recipe: Recipe,
        model: Decoder,
        tokenizer: Tokenizer,
        loader: ChatLoader,
        environment: Environment,
        prompts: PromptForm,
    ) -> None:
        super().__init__(recipe, model, tokenizer, loader, None)
        self._environment, self._prompts = environment, prompts

    def evaluate(self) -> Evaluation | None:
        """The greedy answer to each held-out problem."""
        recipe, settings = self._recipe, distill_settings(self._recipe)
        count = settings.held_out
        if not recipe.eval_every or not count:
            return None
        at_once = min(count, settings.answers_at_once)
        rollouts = Rollouts(self._model, self._tokenizer, max_length=recipe.seq_len, at_once=at_once)
        return Evaluation(examine(rollouts, self._environment, self._prompts, range(count)))


def distill_settings(recipe: Recipe) -> DistillSettings:
    """[distill], or its defaults."""
    return recipe.distill or DistillSettings()


@dataclass(frozen=True)
class _Author:
    """Who wrote the answers in a run's folder, as teacher.json has it."""

    teacher: str
    sha256: str
    environment: str
    shares_ids: bool
    """Whether the student takes the answers' token ids as they are."""


class _Work:
    """One distillation: what it reads, and its two stages."""

    author: _Author
    _teachers_prompts: PromptForm

    def __init__(self, recipe: Recipe, run_dir: Path, stored: Recipe | None) -> None:
        recipe = choose(recipe if stored is None else take_stored_choices(recipe, stored))
        _check(recipe)
        self._recipe, self._settings, self._run_dir = recipe, distill_settings(recipe), run_dir
        self._tokenizer = taught_tokenizer(recipe, run_dir)
        self._prompts = prompt_form(self._settings, self._tokenizer, recipe.seq_len)
        self.environment = open_environment(self._settings, recipe.seed)
        check_problems(self.environment, self._prompts, self._settings.held_out, self._settings.table)
        numbers = problem_numbers(self._settings, self.environment, recipe.seed)
        self._gathering = Gathering(run_dir, self.environment, self._settings, numbers, recipe.seed)

    def check(self, on_event: Callable[[Notice], None]) -> None:
        """What the first stage needs, where it isn't over. Raises UserError."""
        stored = _read_author(self._run_dir)
        if stored is None or not self._gathering.complete:
            self.author = self._open_author(on_event)
        if stored is None:
            return
        name = self.environment.name
        if stored.environment != self.environment.fingerprint():
            raise UserError(_changed(f"{name}: its problems", self._run_dir))
        if not self._gathering.complete and stored != self.author:
            raise UserError(_changed(f"{self._settings.teacher}: the teacher", self._run_dir))
        self.author = stored

    def gather(self, on_event: Callable[[Event | Gathered], None], should_stop: Callable[[], bool]) -> None:
        """The first stage: all that the teacher has to answer is in the folder, and what is kept of it."""
        if self._gathering.complete and (self._run_dir / KEPT).is_file():
            return
        run_dir, recipe = self._run_dir, self._recipe
        # Read before anything is written: what is wrong with it is told then.
        teacher = None if self._gathering.complete else self._load_teacher()
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
        with RunLock(run_dir), use_threads(recipe.threads):
            check_folder(recipe, run_dir)  # again, since another process may have begun a run meanwhile
            lay_out(Inputs(recipe, self._tokenizer, self._objective), run_dir)
            with writing(run_dir):
                write_text(run_dir / TEACHER, json.dumps(asdict(self.author), indent=1) + "\n")
            if teacher is not None:
                self._ask(teacher, on_event, should_stop)
            with writing(run_dir / KEPT):
                write_text(run_dir / KEPT, "".join(json.dumps(lesson.shown()) + "\n" for lesson in self._kept[0]))
        on_event(Notice(str(self.counts)))

    @property
    def counts(self) -> Counts:
        """Of the answers, once all are there."""
        return self._kept[1]

    def open_lessons(
        self, recipe: Recipe, run_dir: Path, stored: Recipe | None, on_event: Callable[[Event], None]
    ) -> Inputs:
        """What the second stage reads. Raises UserError where nothing was kept."""
        if not self.counts.kept:
            raise UserError(f"{run_dir}: nothing to learn: {self.counts}; {advice(self.counts)}, in another --run")
        self._recipe = with_epoch_tokens(self._recipe, self._loader().num_rows * self._recipe.seq_len)
        return Inputs(self._recipe, self._tokenizer, self._objective)

    def _open_author(self, on_event: Callable[[Notice], None]) -> _Author:
        """The teacher, looked at; its weights aren't read yet. Raises UserError."""
        recipe, settings = self._recipe, self._settings
        assert recipe.init_from is not None
        folder = resolve_checkpoint(settings.teacher)
        theirs = load_tokenizer(folder)
        if theirs is None:
            raise UserError(f"{settings.teacher}: the teacher has no tokenizer.json; put its own beside it")
        self._teachers_prompts = prompt_form(settings, theirs, recipe.seq_len)
        check_problems(self.environment, self._teachers_prompts, settings.held_out, settings.table)
        if folder == resolve_checkpoint(recipe.init_from):
            on_event(Notice("teacher and student are the same checkpoint: it learns from its own right answers"))
        shares_template = settings.prompt == "raw" or theirs.chat_template == self._tokenizer.chat_template
        shares_ids = shares_template and theirs.is_same(self._tokenizer)
        if not shares_ids:
            on_event(Notice("teacher and student differ in tokenizer or template: answers are learnt as texts"))
            self._lessons.check(theirs.dialect.thinks)
        identity = checkpoint_identity(folder)["sha256"]
        return _Author(settings.teacher, identity, self.environment.fingerprint(), shares_ids)

    def _load_teacher(self) -> LLM:
        settings, recipe = self._settings, self._recipe
        try:
            return LLM(
                settings.teacher,
                device=recipe.device,
                max_length=recipe.seq_len,
                max_num_seqs=settings.answers_at_once,
                num_speculative_tokens=0,  # at these batch sizes drafts cost more than they save
            )
        except UserError as error:
            raise UserError(f"teacher {settings.teacher}, seq_len = {recipe.seq_len}: {error}") from None

    def _ask(self, teacher: LLM, on_event: Callable[[Event | Gathered], None], should_stop: Callable[[], bool]) -> None:
        try:
            self._gathering.run(
                teacher,
                self._teachers_prompts,
                with_ids=self.author.shares_ids,
                on_event=on_event,
                should_stop=should_stop,
            )
        except Stopped:
            done, total = len(self._gathering.asked), self._gathering.total
            raise Stopped(
                f"{self._run_dir}: stopped after {done:,} of {total:,} problems; the same command goes on"
            ) from None

    def _objective(self, model: Decoder) -> Distillation:
        return Distillation(self._recipe, model, self._tokenizer, self._loader(), self.environment, self._prompts)

    def _loader(self) -> ChatLoader:
        return ChatLoader(
            [lesson.taught for lesson in self._kept[0]],
            [sha256((self._run_dir / ANSWERS).read_bytes()).hexdigest()],
            seq_len=self._recipe.seq_len,
            seed=self._recipe.seed,
            pad_id=pad_token(self._tokenizer),
        )

    @property
    def _lessons(self) -> Lessons:
        return Lessons(self._settings, self._tokenizer, self._prompts, self._recipe.seq_len)

    @cached_property
    def _kept(self) -> tuple[list[Lesson], Counts]:
        return self._lessons.choose(self._gathering.asked)


def _check(recipe: Recipe) -> None:
    settings = distill_settings(recipe)
    if world_size() > 1:
        raise UserError("a distillation runs in one process as yet; leave the launcher out")
    if not settings.teacher:
        raise UserError("no teacher: fireflyer distill TEACHER STUDENT")
    check_post_training(recipe, "distill")
    if recipe.data.sources or recipe.eval_data is not None:
        raise UserError("a student learns what its teacher writes; leave data.sources and eval_data out")
    if settings.temperature == 0 and settings.samples > 1:
        raise UserError(
            f"distill.temperature = 0 with distill.samples = {settings.samples}: they would all be alike; set samples"
            " to 1 or raise the temperature"
        )
    if settings.keep > settings.samples:
        raise UserError(
            f"distill.keep = {settings.keep} is more than distill.samples = {settings.samples}; lower it or draw more"
        )
    if recipe.lora is not None and recipe.eval_every:
        raise UserError("with [lora] the student can't be examined while it learns; --set eval_every=0")


def _changed(what: str, run_dir: Path) -> str:
    return f"{what} changed since {run_dir} was begun; put it back as it was, or begin another run"


def _read_author(run_dir: Path) -> _Author | None:
    path = run_dir / TEACHER
    return _Author(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def _read_counts(run_dir: Path) -> Counts | None:
    """None where the process ended between the run's summary and its counts."""
    stored = json.loads((run_dir / SUMMARY).read_text(encoding="utf-8")).get("distill")
    return None if stored is None else Counts(**stored)


def _write_counts(run_dir: Path, counts: Counts) -> None:
    path = run_dir / SUMMARY
    stored = json.loads(path.read_text(encoding="utf-8"))
    with writing(path):
        write_text(path, json.dumps({**stored, "distill": asdict(counts)}, indent=1) + "\n")
