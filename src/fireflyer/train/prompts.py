"""How a problem is put to the model: in the checkpoint's chat template, or as it stands.

In: a problem's text. Out: the prompt's text and token ids, with room for an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer


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
                f"{where}: the prompt has {len(ids)} tokens, which with grpo.max_answer_tokens ="
                f" {self.max_answer_tokens} is more than seq_len = {self.max_length}; raise seq_len, or leave it out"
            )
        return text, ids
