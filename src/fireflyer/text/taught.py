"""A chat as training sees it: token ids, and which of them the assistant wrote and is to learn.

In: messages and tools as the OpenAI API has them. Out: `Taught` sequences in the checkpoint's own template. What comes
before an answer is encoded exactly as it is for a prompt, and the answer with the stop token after it by itself, so
that the model meets at each position what it will meet when it answers. Nothing is encoded twice.

Templates leave out the thinking of earlier turns. A turn that thinks is therefore taught in a sequence of its own,
which ends with it; the turns that don't think are taught together, in the sequence of the whole chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fireflyer.errors import UserError
from fireflyer.text.messages import message_text
from fireflyer.text.special_tokens import THINK_BEGIN, THINK_END
from fireflyer.text.templates import Message, Tool
from fireflyer.text.tokenizer import Tokenizer

# A noncharacter, never found in text: where the answer begins in a rendering.
_HERE = "\ufdd3"

_KEYS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "weight"})
_AFTER = {  # what may follow which role
    "": ("system", "developer", "user"),
    "system": ("system", "developer", "user"),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}


@dataclass(frozen=True)
class Taught:
    """One sequence; `trained` says of each token whether it is learnt."""

    token_ids: list[int]
    trained: list[bool]


def check_turns(messages: Sequence[Any]) -> None:
    """Refuse what can't be learnt from: roles out of order, keys that nobody reads, no assistant at the end."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError("messages must be a list of at least one question and its answer")
    before = ""
    for index, message in enumerate(messages):
        where = f"message {index}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'{where} must be an object with "role" and "content", got {message!r:.80}')
        if unknown := sorted(message.keys() - _KEYS):
            raise UserError(f"{where} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
        role = message["role"]
        if role not in _AFTER[before]:
            after = f"comes after {before!r}" if before else "begins the chat"
            raise UserError(f"{where} is by {role!r:.40} and {after}; here only {' or '.join(_AFTER[before])} can be")
        if message.get("weight", 1) not in (0, 1) or isinstance(message.get("weight"), bool):
            raise UserError(f"{where} has weight {message['weight']!r:.40}; it must be 0 (not learnt) or 1")
        before = (
            "calls" if role == "assistant" and message.get("tool_calls") else "system" if role == "developer" else role
        )
    if messages[-1]["role"] != "assistant":
        raise UserError(f"the chat ends with {messages[-1]['role']!r}; the last message must be the assistant's")


def taught_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[Taught]:
    """The sequences of one chat, that of its last answer last. Raises UserError, naming the message.

    Every message of the assistant is learnt but those with a weight of 0.
    """
    check_turns(messages)
    chat = _Chat(tokenizer, messages, tools, variables)
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    if not wanted:
        raise UserError("every message of the assistant has weight 0; nothing is left to learn")
    last = len(messages) - 1
    alone = [i for i in wanted if i != last and chat.thinks(i)]
    together = [i for i in wanted if i != last and i not in alone]
    sequences = [chat.sequence(end, [], True) for end in alone]
    if last in wanted or together:
        sequences.append(chat.sequence(last, together, last in wanted))
    return sequences


def taught_text(tokenizer: Tokenizer, prompt: str, completion: str) -> Taught:
    """A prompt as it stands and what is to follow it, with the stop token. Special tokens in both count."""
    before = tokenizer.encode_prompt(prompt)
    after = [*tokenizer.encode(completion, allow_special=True), tokenizer.eos_id]
    return Taught([*before, *after], [False] * len(before) + [True] * len(after))


class _Chat:
    """One chat, with the control tokens that its authors spelt out broken."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None,
        variables: Mapping[str, Any] | None,
    ) -> None:
        self._tokenizer, self._dialect = tokenizer, tokenizer.dialect
        self._variables = dict(variables or {})
        plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        for index, message in enumerate(plain):
            if message["role"] == "assistant":
                message["content"] = message_text(message.get("content"), f"message {index}") or ""
        self._messages, self._tools, self._mark = tokenizer.shield_chat(plain, tools)
        self._end = tokenizer.token_text(tokenizer.eos_id)

    def thinks(self, index: int) -> bool:
        """Whether this turn is to be taught with its thinking, which later turns don't see."""
        return bool(self._thought(index)[0]) or self._opens_thinking()

    def sequence(self, end: int, others: Sequence[int], learns_end: bool) -> Taught:
        """Up to the answer number `end`; `others` are earlier answers to be learnt with it."""
        thought, answer = self._thought(end)
        variables = {"thinking": True, **self._variables} if thought else self._variables
        history = [_here(m) if i in others else m for i, m in enumerate(self._messages[:end])]
        said = {k: v for k, v in self._messages[end].items() if k != "reasoning_content"} | {"content": answer}
        prompt = self._render(history, True, variables)
        whole = self._render([*history, _here(said)], False, variables)
        if whole.replace(_HERE, "") != self._render([*self._messages[:end], said], False, variables):
            raise UserError(f"message {end}: the chat template rewrites what the assistant says; it can't be taught")
        head, found, tail = whole.rpartition(_HERE)
        place = tail.find(self._end)
        if not found or place < 0:
            raise UserError(
                f"message {end}: the chat template puts no stop token {self._end} after it; it can't be taught"
            )
        tail = tail[: place + len(self._end)]
        state = self._dialect.thinking_at_end(prompt.replace(_HERE, ""))
        if thought and state == "closed":
            raise UserError(f"message {end} has thinking, for which this chat template has no form; leave it out")
        if thought or state == "open":
            opening = "" if state == "open" else THINK_BEGIN
            gap = "\n\n" if prompt.endswith("\n") else answer[: len(answer) - len(answer.lstrip())]
            head, tail = prompt, opening + thought + THINK_END + gap + tail
        elif head.startswith(prompt):
            head, tail = prompt, head[len(prompt) :] + tail
        pieces = self._split(head, others, variables)
        return self._encode([*pieces, (tail, learns_end)])

    def _split(self, head: str, others: Sequence[int], variables: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """What comes before an answer, taken apart at the answers in it that are learnt."""
        pieces: list[tuple[str, bool]] = []
        for index in others:
            before, found, rest = head.partition(_HERE)
            place = rest.find(self._end)
            if not found or place < 0:
                raise UserError(f"message {index}: the chat template leaves it out, or puts no stop token after it")
            done = "".join(text for text, _ in pieces)
            prompt = self._render(self._messages[:index], True, variables)
            start = len(prompt) - len(done) if (done + before).startswith(prompt) else len(before)
            stop = place + len(self._end)
            pieces += [(before[:start], False), (before[start:] + rest[:stop], True)]
            head = rest[stop:]
        return [*pieces, (head, False)]

    def _encode(self, pieces: Sequence[tuple[str, bool]]) -> Taught:
        encoded = self._tokenizer.encode_pieces([text for text, _ in pieces], self._mark)
        return Taught(
            [token for ids in encoded for token in ids],
            [learnt for ids, (_, learnt) in zip(encoded, pieces, strict=True) for _ in ids],
        )

    def _render(self, messages: Sequence[Message], prompted: bool, variables: Mapping[str, Any]) -> str:
        return self._tokenizer.render_chat(messages, prompted, self._tools or None, variables)

    def _thought(self, index: int) -> tuple[str, str]:
        """(thinking, answer) of an answer, whichever way it gives its thinking."""
        message = self._messages[index]
        thought, answer = message.get("reasoning_content") or "", message["content"]
        if not isinstance(thought, str):
            raise UserError(f"message {index}: reasoning_content must be a text, got {thought!r:.80}")
        if not thought and self._dialect.thinks and answer.lstrip().startswith(THINK_BEGIN):
            thought, _, answer = answer.lstrip()[len(THINK_BEGIN) :].partition(THINK_END)
            answer = answer.lstrip("\n")
        return thought.lstrip("\n"), answer

    def _opens_thinking(self) -> bool:
        prompt = self._render(self._messages[:1], True, self._variables)
        return self._dialect.starts_in_thinking(prompt)


def _here(message: Message) -> dict[str, Any]:
    """The message with a mark where its text begins, after white space, which templates may trim."""
    text = message["content"]
    place = len(text) - len(text.lstrip())
    return {**message, "content": text[:place] + _HERE + text[place:]}
