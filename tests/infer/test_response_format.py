"""What may be asked for as a form: kept in full or refused, in one line."""

import json
import math
import sys

import pytest
from grammar_masks import PLAIN, accepts, allowed_after, schema_format

from fireflyer.errors import UserError
from fireflyer.infer import structured_output
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.structured_output import GrammarCompiler

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [tokenizer.eos_id])


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


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "grammar",
    [
        "start: /b+/ start",
        'start: "x" rest\nrest: /b+/ rest // no end',
        '%llguidance {"no_forcing": false}\nstart: /b+/ start',
    ],
)
def test_a_grammar_without_end_does_not_hang(compiler, grammar):
    state = compiler.start({"type": "grammar", "grammar": grammar}, PLAIN)
    for token in compiler.tokenizer.encode("xbbb" if "x" in grammar else "bbb"):
        assert allowed_after(state)[token]
        state.commit(token)


def test_properties_come_in_the_order_of_the_schema(compiler):
    for names in ("ab", "ba"):
        schema = {"type": "object", "properties": {name: {"type": "null"} for name in names}, "required": ["a", "b"]}
        assert accepts(compiler, schema_format(schema), json.dumps(dict.fromkeys(names)))
        assert not accepts(compiler, schema_format(schema), json.dumps(dict.fromkeys(names[::-1])))


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
    params = SamplingParams(response_format=schema)
    assert params.response_format == schema
    schema["json_schema"]["schema"]["type"] = "array"  # what was checked is what counts
    assert params.response_format != schema
    assert SamplingParams(response_format={"type": "text"}).response_format is None
    assert SamplingParams().response_format is None
