"""What a student learns of a teacher's answers: which are kept, why the others are dropped, and as which tokens.

In: problems with their answers. Out: sequences in which the answer is trained on and the prompt is not. Answers keep
the ids that the teacher drew where the student's tokenizer and template are the same; else their texts are encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fireflyer.errors import UserError
from fireflyer.text.special_tokens import THINK_BEGIN, THINK_END
from fireflyer.text.taught import Taught, taught_chat, taught_text
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.post_training_settings import DistillSettings
from fireflyer.train.prompts import PromptForm
from fireflyer.train.teacher import Answer, Asked

_REASONS = {
    "wrong": "wrong",
    "cut_off": "cut off",
    "not_graded": "not graded",
    "duplicate": "duplicates",
    "surplus": "more than distill.keep",
    "too_long": "longer than seq_len in the student's tokens",
}


@dataclass(frozen=True)
class Lesson:
    """An answer that is kept."""

    asked: Asked
    answer: Answer
    taught: Taught

    def shown(self) -> dict[str, Any]:
        """A line for people to read."""
        return {"problem": self.asked.problem, "answer": self.answer.text, "reward": self.answer.reward}


@dataclass(frozen=True)
class Counts:
    """What became of the answers. passed_over: problems too long to be put; dropped: answers by reason."""

    problems: int
    passed_over: int
    answers: int
    kept: int
    problems_kept: int
    dropped: dict[str, int]

    def __str__(self) -> str:
        why = ", ".join(f"{self.dropped[name]:,} {words}" for name, words in _REASONS.items() if self.dropped[name])
        said = (
            f"kept {self.kept:,} of {self.answers:,} answers, to {self.problems_kept:,} of {self.problems:,} problems"
        )
        return f"{said}; dropped: {why}" if why else said


def advice(counts: Counts) -> str:
    """What to change where nothing was kept."""
    most = max(counts.dropped, key=lambda name: counts.dropped[name])
    return {
        "wrong": "give easier problems, a better teacher or more distill.samples",
        "cut_off": "raise distill.max_answer_tokens and seq_len",
        "not_graded": "look at the environment's grader",
        "too_long": "raise seq_len",
    }.get(most, "give other problems")


class Lessons:
    """How answers become sequences of the student's tokens."""

    def __init__(self, settings: DistillSettings, tokenizer: Tokenizer, prompts: PromptForm, seq_len: int) -> None:
        self._settings, self._tokenizer, self._prompts, self._seq_len = settings, tokenizer, prompts, seq_len

    def check(self, thinks: bool) -> None:
        """That the student's template has a form for such answers. Raises UserError."""
        text = f"{THINK_BEGIN}so{THINK_END}1" if thinks else "1"
        try:
            self._taught("1?", Answer(text, 1.0, "right", "", None))
        except UserError as error:
            raise UserError(f"the student's chat template can't hold the teacher's answers: {error}") from None

    def choose(self, asked: Sequence[Asked]) -> tuple[list[Lesson], Counts]:
        """The best of each problem's right answers, at most `keep`; of equal ones those that were drawn first."""
        lessons: list[Lesson] = []
        dropped: Counter[str] = Counter(dict.fromkeys(_REASONS, 0))
        for one in asked:
            own: list[Lesson] = []
            for answer in sorted(one.answers, key=lambda answer: -answer.reward):
                if answer.verdict != "right":
                    dropped[answer.verdict] += 1
                elif any(answer.text == lesson.answer.text for lesson in own):
                    dropped["duplicate"] += 1
                elif len(own) == self._settings.keep:
                    dropped["surplus"] += 1
                elif (taught := self._taught(one.problem, answer)) is None:
                    dropped["too_long"] += 1
                else:
                    own.append(Lesson(one, answer, taught))
            lessons += own
        counts = Counts(
            problems=len(asked),
            passed_over=sum(not one.answers for one in asked),
            answers=sum(len(one.answers) for one in asked),
            kept=len(lessons),
            problems_kept=len({lesson.asked.number for lesson in lessons}),
            dropped=dict(dropped),
        )
        return lessons, counts

    def _taught(self, problem: str, answer: Answer) -> Taught | None:
        """None for one that no row can hold."""
        if answer.token_ids is not None:
            _, before = self._prompts.encode(problem, problem)
            after = [*answer.token_ids[:-1], self._tokenizer.eos_id]  # the teacher may have several end tokens
            taught = Taught([*before, *after], [False] * len(before) + [True] * len(after))
        elif self._settings.prompt == "raw":
            taught = taught_text(self._tokenizer, problem, answer.text)
        else:
            system, said = self._settings.system, {"role": "assistant", "content": answer.text}
            before = [{"role": "system", "content": system}] if system else []
            (taught,) = taught_chat(self._tokenizer, [*before, {"role": "user", "content": problem}, said])
        return taught if len(taught.token_ids) <= self._seq_len + 1 else None
