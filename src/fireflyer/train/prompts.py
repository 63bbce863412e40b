"""How a problem is put to the model: in the checkpoint's chat template, or as it stands.

In: a problem's text. Out: the prompt's text and token ids, with room for an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.environments import Environment
from fireflyer.train.post_training_settings import ProblemSettings


@dataclass(frozen=True)
class PromptForm:
    """kind: "chat" makes the problem the user's message (after `system`, if there is one); "raw" takes it as it is.

    max_length: tokens of prompt and answer together; max_answer_tokens: how many an answer may have.
    """

    tokenizer: Tokenizer
    kind: Literal["chat", "raw"]
    system: str | None
    max_length: int
    max_answer_tokens: int

    def encode(self, problem: str, where: str) -> tuple[str, list[int]]:
        """(text, ids). Raises UserError, naming `where`, for a prompt that leaves too little room for an answer."""
        if self.kind == "raw":
            text, ids = problem, self.tokenizer.encode_prompt(problem)
        else:
            said = [{"role": "system", "content": self.system}] if self.system else []
            messages = [*said, {"role": "user", "content": problem}]
            text, ids = self.tokenizer.render_chat(messages), self.tokenizer.encode_chat(messages)
        if len(ids) + self.max_answer_tokens > self.max_length:
            raise UserError(
                f"{where}: the prompt has {len(ids)} tokens, which with max_answer_tokens ="
                f" {self.max_answer_tokens} is more than seq_len = {self.max_length}; raise seq_len, or leave it out"
            )
        return text, ids


_LOOKED_AT = 16


def prompt_form(settings: ProblemSettings, tokenizer: Tokenizer, seq_len: int) -> PromptForm:
    """How a recipe's problems are put to the model of this tokenizer. Raises UserError where there is no room."""
    if settings.max_answer_tokens >= seq_len:
        raise UserError(
            f"{settings.table}.max_answer_tokens = {settings.max_answer_tokens} leaves no room for a prompt in seq_len"
            f" = {seq_len}; lower it or raise seq_len"
        )
    return PromptForm(tokenizer, settings.prompt, settings.system, seq_len, settings.max_answer_tokens)


def check_problems(environment: Environment, prompts: PromptForm, held_out: int, table: str) -> None:
    """Every prompt of a file has to fit; of problems without end the first few are looked at. Raises UserError."""
    count = environment.num_problems
    if count is not None and count <= held_out:
        raise UserError(
            f"{environment.name}: {count} problems, of which evaluation holds out {table}.held_out = {held_out}; none"
            " is left to train on: lower it, or give more"
        )
    for number in range(held_out + _LOOKED_AT if count is None else count):
        problem = environment.problem(number)
        prompts.encode(problem.prompt, problem.where)
