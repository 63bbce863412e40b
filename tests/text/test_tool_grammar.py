"""The grammar of calls: llguidance takes it, and it lets through just what the reply parser reads as calls."""

import llguidance
import pytest

from fireflyer.errors import UserError
from fireflyer.text.dialects import Dialect, detect_dialect
from fireflyer.text.parsers import parse_reply
from fireflyer.text.special_tokens import (
    RESERVED,
    TOOL_CALL_BEGIN,
    TOOL_CALL_END,
    TOOL_CALLS_BEGIN,
    TOOL_CALLS_END,
    TOOL_SEPARATOR,
)
from fireflyer.text.templates import BUILT_IN
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.text.tool_grammar import tool_grammar

V3, V31 = (detect_dialect(BUILT_IN[name]) for name in ("v3", "v3.1"))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "look.up", "parameters": {"properties": {"key": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "add_all"}},
]


class Vocabulary:
    """What llguidance asks of a tokenizer: control tokens are special, so that no text spells them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self.tokens = [tokenizer.token_bytes(i, skip_special=False) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = list(range(len(RESERVED)))

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", errors="replace"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(['function add look.up ```json {"a": 1, "b": 2}'] * 9, 320)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> object:
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokenizer)))


def fenced(name: str, arguments: str) -> str:
    return f"{TOOL_CALL_BEGIN}function{TOOL_SEPARATOR}{name}\n```json\n{arguments}\n```{TOOL_CALL_END}"


def bare(name: str, arguments: str) -> str:
    return f"{TOOL_CALL_BEGIN}{name}{TOOL_SEPARATOR}{arguments}{TOOL_CALL_END}"


def block(*calls: str, between: str = "") -> str:
    return TOOL_CALLS_BEGIN + between.join(calls) + TOOL_CALLS_END


GOOD = ('{"a": 1, "b": -2}', '{"a":1,"b":22}', '{\n  "a": 1,\n  "b": 2\n}')
BAD = ('{"a": 1}', '{"a": "1", "b": 2}', '{"b": 1, "a": 2, "c": 3}', "{}", '{"a": 1, "b": 2')


@pytest.mark.parametrize(("dialect", "call", "between"), [(V3, fenced, "\n"), (V31, bare, "")], ids=["v3", "v3.1"])
def test_good_calls_pass_and_bad_ones_do_not(
    tokenizer: Tokenizer, vocabulary: object, dialect: Dialect, call: object, between: str
) -> None:
    def passes(text: str, choice: str = "required", parallel: bool = True) -> bool:
        grammar = tool_grammar(dialect, TOOLS, choice, parallel=parallel)
        assert llguidance.LLMatcher.validate_grammar_with_warnings(grammar, vocabulary) == (False, [])
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
        ids = tokenizer.encode(text, allow_special=True)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    for arguments in GOOD:
        text = block(call("add", arguments))
        assert passes(text), text
        assert passes(text, "add"), text
        assert passes(text, parallel=False), text
        assert not passes(text, "look.up"), text
        (parsed,) = parse_reply(dialect, "", text, TOOLS).tool_calls
        assert (parsed.name, parsed.arguments) == ("add", arguments)
    for arguments in BAD:
        assert not passes(block(call("add", arguments))), arguments
    assert passes(block(call("look.up", '{"key": "é\\n```"}')))
    assert passes(block(call("add_all", '{"x": [1]}')))
    two = block(call("add", GOOD[0]), call("add_all", "{}"), between=between)
    assert passes(two)
    assert not passes(two, parallel=False)
    assert not passes(block(call("add", GOOD[0]), call("add", GOOD[0]), between=between), "add")
    assert len(parse_reply(dialect, "", two, TOOLS).tool_calls) == 2
    for text in ("Sure. " + two, block(), call("add", GOOD[0]), two + "x", block(call("sub", "{}"))):
        assert not passes(text), text
    # Spelt out in letters, the marks are no marks.
    matcher = llguidance.LLMatcher(vocabulary, tool_grammar(dialect, TOOLS, "required"), log_level=0)
    assert matcher.try_consume_tokens(tokenizer.encode(TOOL_CALLS_BEGIN)) == 0


def test_blanks_have_an_end_and_no_schema_loosens_that(tokenizer: Tokenizer, vocabulary: object) -> None:
    parameters = {"type": "object", "x-guidance": {"whitespace_pattern": "( )*"}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    matcher = llguidance.LLMatcher(vocabulary, tool_grammar(V31, tools, "add"), log_level=0)
    head = tokenizer.encode(f"{TOOL_CALLS_BEGIN}{TOOL_CALL_BEGIN}add{TOOL_SEPARATOR}", allow_special=True)
    blank = tokenizer.encode("{" + "\n \t" * 40)
    assert matcher.try_consume_tokens(head) == len(head)
    assert 32 < matcher.try_consume_tokens(blank) < len(blank)


def test_what_can_not_be_called_is_told() -> None:
    with pytest.raises(UserError, match=r"'sub', which is not among the tools: add, look\.up, add_all"):
        tool_grammar(V3, TOOLS, "sub")
    with pytest.raises(UserError, match="no form for them"):
        tool_grammar(detect_dialect(BUILT_IN["v2"]), TOOLS, "required")
    with pytest.raises(UserError, match="at least one tool"):
        tool_grammar(V3, [], "required")
    for parameters in ({"type": "string"}, ["a"]):
        with pytest.raises(UserError, match="function 'f': parameters must be a JSON schema of an object"):
            tool_grammar(V3, [{"type": "function", "function": {"name": "f", "parameters": parameters}}], "f")
