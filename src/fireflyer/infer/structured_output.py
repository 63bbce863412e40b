"""Answers held to a form: a grammar says at each step which tokens may come. In: a response_format, a tokenizer, and
whether the prompt ended inside thinking. Out: masks of the tokens that may follow a history.

The grammars are llguidance's. A grammar begins where the thinking ends, and never ends before it is satisfied: until
then there is no end token. Drafts are tried on the grammar and rolled back; only `commit` moves it.

Shapes: R rows, V tokens of the tokenizer, W words of 32 bits that hold one bit for each of them.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fireflyer.errors import UserError
from fireflyer.text.dialects import Thinking, detect_dialect
from fireflyer.text.special_tokens import THINK_BEGIN, THINK_END
from fireflyer.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT_GRAMMARS = 64

_WHAT = {
    "json_object": "JSON",
    "json_schema": "the schema",
    "regex": "the pattern",
    "choice": "the choices",
    "grammar": "the grammar",
}

# Without a bound, a model that is unsure writes blanks for ever: the usual death of JSON answers.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"

_THINK_END = THINK_END.encode()
_ALL = np.uint32(0xFFFFFFFF)


class GrammarCompiler:
    """Grammars for one tokenizer, the last ones kept. Safe to use from several threads.

    Args:
        end_token_ids: tokens that end an answer: allowed only where the grammar is satisfied.

    Raises UserError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, end_token_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.end_token_ids = sorted({t for t in end_token_ids if t < tokenizer.vocab_size} | {tokenizer.eos_id})
        self.vocabulary = _vocabulary(tokenizer, self.end_token_ids)
        opening = tokenizer.encode(THINK_BEGIN, allow_special=True)
        self.think_begin_id = opening[0] if len(opening) == 1 else None
        self._dialect = detect_dialect(tokenizer.chat_template)
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, response_format: Mapping[str, Any], prompt_token_ids: Sequence[int] = ()) -> GrammarState:
        """The state of a new answer to this prompt. Raises UserError that quotes what llguidance finds wrong."""
        # The order of keys counts: a schema's properties are written in it.
        key = json.dumps(response_format)
        with self._lock:
            matcher = self._kept.get(key)
        if matcher is None:
            matcher = _compiled(response_format, self.vocabulary)
        with self._lock:
            self._kept[key] = matcher
            self._kept.move_to_end(key)
            if len(self._kept) > _KEPT_GRAMMARS:
                self._kept.popitem(last=False)
        prompt = self.tokenizer.decode(prompt_token_ids, skip_special=False)
        return GrammarState(self, matcher, self._dialect.thinking_at_end(prompt))


class GrammarState:
    """Where one answer stands in its grammar. `error` says why it can't go on; None while it can.

    thinking: where the answer begins: "open" inside thinking, "unopened" where its first token may open it.
    """

    def __init__(self, compiler: GrammarCompiler, start: LLMatcher, thinking: Thinking) -> None:
        self.error: str | None = None
        self._compiler = compiler
        self._start = start
        self._matcher = start.deep_copy()
        self._consumed: list[int] = []
        self._phase: Literal["opening", "thinking", "grammar"] = "grammar"
        if thinking == "open":
            self._phase = "thinking"
        elif thinking == "unopened" and compiler.think_begin_id is not None:
            self._phase = "opening"
        self._tail = b""

    def commit(self, token_id: int) -> None:
        """Accept a token of the answer."""
        if token_id not in self._compiler.end_token_ids and not self._advance(token_id):
            self.error = self._complaint() or "the grammar does not go on with this text"

    def fill(self, words_RW: NDArray[np.uint32], histories: Sequence[tuple[int, ...]]) -> list[str | None]:
        """Set the bits of the tokens that may follow each history, which is drafts after the committed tokens; one
        error, or None, for each.

        Cheapest where each history goes on from the one before. After drafts that the grammar refuses every token is
        allowed: such a row is never reached, because the row before it has another token.
        """
        words_RW.fill(_ALL)
        if self.error is not None:
            return [self.error] * len(histories)
        committed = (self._phase, self._tail, len(self._consumed))
        errors: list[str | None] = []
        walked: tuple[int, ...] = ()
        sound = True
        for words_W, history in zip(words_RW, histories, strict=True):
            if history[: len(walked)] != walked:
                self._go_back(*committed)
                walked, sound = (), True
            sound = sound and all(self._advance(token_id) for token_id in history[len(walked) :])
            walked = history
            errors.append(self._fill(words_W) if sound else None)
        self._go_back(*committed)
        return errors

    def _fill(self, words_W: NDArray[np.uint32]) -> str | None:
        if self._phase == "thinking":
            for token_id in self._compiler.end_token_ids:
                words_W[token_id >> 5] &= ~_bit(token_id)
            return None
        self._matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        if not words_W.any() or self._matcher.is_error():
            return self._complaint() or "the grammar allows no token here"
        if self._phase == "opening" and self._compiler.think_begin_id is not None:
            words_W[self._compiler.think_begin_id >> 5] |= _bit(self._compiler.think_begin_id)
        return None

    def _advance(self, token_id: int) -> bool:
        """Go on by one token; False if the grammar refuses it."""
        if self._phase == "opening":
            self._phase = "thinking" if token_id == self._compiler.think_begin_id else "grammar"
            if self._phase == "thinking":
                return True
        if self._phase == "grammar":
            return self._consume([token_id])
        text = self._tail + self._compiler.tokenizer.token_bytes(token_id, skip_special=False)
        _, end, rest = text.partition(_THINK_END)
        self._tail = text[1 - len(_THINK_END) :]
        if not end:
            return True
        self._phase = "grammar"
        # Only where </think> is no token of its own can one token hold its end and a piece of the answer.
        rest = rest.lstrip()
        return not rest or self._consume(self._compiler.vocabulary.tokenize_bytes(rest))

    def _consume(self, token_ids: list[int]) -> bool:
        count = self._matcher.try_consume_tokens(token_ids)
        self._consumed += token_ids[:count]
        return count == len(token_ids)

    def _go_back(self, phase: Literal["opening", "thinking", "grammar"], tail: bytes, num_consumed: int) -> None:
        self._phase, self._tail = phase, tail
        count = len(self._consumed) - num_consumed
        del self._consumed[num_consumed:]
        if count and not self._matcher.is_error():
            self._matcher.rollback(count)
        if self._matcher.is_error():
            # A matcher never leaves an error. What caused it may have been a draft: without it, another is as good.
            self._matcher = self._start.deep_copy()
            self._matcher.consume_tokens(self._consumed)

    def _complaint(self) -> str:
        return _one_line(self._matcher.get_error())


def _bit(token_id: int) -> np.uint32:
    return np.uint32(1 << (token_id & 31))


class _Words:
    """A tokenizer in the form that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        lengths = tokenizer.byte_lengths()
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(token_id, skip_special=False) for token_id in range(len(lengths))]
        self.special_token_ids = [token_id for token_id, length in enumerate(lengths) if length == 0]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", errors="replace"))


def _vocabulary(tokenizer: Tokenizer, end_token_ids: list[int]) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise UserError(
            "response_format needs llguidance, which is not installed; type: pip install 'fireflyer[serve]'"
        ) from None
    return LLTokenizer(TokenizerWrapper(_Words(tokenizer)), eos_token=end_token_ids)


def _compiled(response_format: Mapping[str, Any], vocabulary: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = _grammar(response_format)
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        first = matcher.deep_copy()
        first.compute_bitmask()
        complaints = [first.get_error()] if first.is_error() else matcher.get_grammar_warnings()
        if complaints:
            raise ValueError(complaints[0])
    except ValueError as error:
        complaint = _one_line(str(error))
        if complaint.startswith("NoExtension"):
            complaint = "no text has this form"
        raise UserError(f"response_format: {_WHAT[response_format['type']]} can't be used: {complaint}") from None
    return matcher


def _grammar(response_format: Mapping[str, Any]) -> str:
    """A response_format in llguidance's own notation. Raises ValueError."""
    from llguidance import LLMatcher

    kind = response_format["type"]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(response_format["pattern"])
    if kind == "grammar":
        # llguidance looks ahead for text that has to come, and never returns where that has no end: `a: /b+/ a`.
        return LLMatcher.grammar_from_lark(response_format["grammar"] + '\n%llguidance {"no_forcing": true}\n')
    if kind == "choice":
        choices = " | ".join(json.dumps(choice) for choice in response_format["choices"])
        return LLMatcher.grammar_from_lark(f"start: {choices}")
    schema = {"type": "object"} if kind == "json_object" else response_format["json_schema"]["schema"]
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_pattern": _WHITESPACE})
    _check_bounds(schema)
    return grammar


def _check_bounds(schema: object) -> None:
    """Raises ValueError where llguidance 1.9.1 goes wrong: bounds that leave out 0 and end before 1 let 0 through."""
    if isinstance(schema, list):
        for part in schema:
            _check_bounds(part)
    if not isinstance(schema, dict):
        return
    for side, opposite in (("Minimum", "Maximum"), ("Maximum", "Minimum")):
        exclusive = schema.get(f"exclusive{side}")
        if exclusive is True:  # draft 4
            exclusive = schema.get(side.lower())
        others = [schema.get(opposite.lower()), schema.get(f"exclusive{opposite}")]
        if _is_number(exclusive) and exclusive == 0 and any(_is_number(other) and abs(other) < 1 for other in others):
            raise ValueError(f"exclusive{side} 0 with a {opposite.lower()} less than 1 away from it is not supported")
    for part in schema.values():
        _check_bounds(part)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _one_line(complaint: str) -> str:
    """llguidance's message without the excerpt of the source beneath it, on one line."""
    complaint = re.sub(r"\n\s+\d+ \|.*", "", complaint, flags=re.DOTALL)
    line = " ".join(complaint.split())
    return line if len(line) <= 300 else line[:300] + "..."
