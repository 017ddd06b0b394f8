# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Texts that a careless writer would never end, within a number of tokens."""

import json
import random
from decimal import Decimal
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest

from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.parsers.call_grammar import Thought, forced_calls, free_calls
from llmserve.parsers.registry import TOOL_PARSERS
from llmserve.structured_output.base import CompiledGrammar, Matcher
from llmserve.structured_output.closing import Closing, Way
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.vocabulary import Vocabulary
from llmserve.structured_output.xgrammar import XGrammarBackend
from tests.helpers.grammar import BYTES, EOS, WORDS, allowed, grammar, random_schema
from tests.helpers.parsers import Output, Parsed, loaded

TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "of": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name", "of"],
}
ARGUMENTS = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "m": {"type": "string", "minLength": 3},
        "x": {"type": "string", "maxLength": 400},
        "i": {"type": "integer"},
        "o": {"type": "object", "properties": {"t": {"type": "array"}}, "required": ["t"]},
        "e": {"enum": ["a", 5]},
    },
    "required": ["s"],
}
LONG = {  # what is optional takes many times what is not
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "note": {"type": "string", "minLength": 40},
        "tags": {"type": "array", "items": {"const": "a tag of some thirty characters"}},
        "either": {"enum": ["x", "a word that is much longer than the other"]},
    },
    "required": ["id", "tags"],
}


@cache
def _closing() -> Closing:
    return Closing(BYTES)


def _write(
    grammar: CompiledGrammar,
    total: int,
    rng: random.Random,
    is_foreign: bool = False,
    first: bytes = b"",
) -> bytes | None:
    """By someone who opens what can be opened and writes on, half of it in characters of several
    bytes if `is_foreign`, behind `first`; None if it does not end."""
    matcher = grammar.start()
    way, words = Way(_closing(), grammar, matcher, total), np.zeros(WORDS, np.int32)
    out = bytearray()
    for left in range(total, 0, -1):
        if matcher.ended():
            return bytes(out)
        matcher.fill(words)
        before = set(allowed(words))
        way.narrow(matcher, words, left)
        tokens = allowed(words)
        assert tokens and before.issuperset(tokens)
        printable = [t for t in tokens if 32 < t < 127] or tokens
        for closers in (b'"}]', b"}]"):
            eager = [t for t in printable if t != EOS and t not in closers]
            if eager:
                break
        foreign = [t for t in tokens if 127 < t < EOS]
        if is_foreign and foreign and rng.random() < 0.5:
            eager = foreign
        token = rng.choice(eager or printable) if len(out) >= len(first) else first[len(out)]
        if token == EOS:
            return bytes(out)
        assert matcher.accept(token)
        way.took(token)
        out.append(token)
    return None


@pytest.mark.parametrize("engine", ["auto", "guidance"])
@pytest.mark.parametrize(
    "schema", [{"type": "object"}, {"type": "string"}, {"type": "number"}, TREE, LONG, {}]
)
def test_it_ends_in_time(schema: Any, engine: str) -> None:
    rng = random.Random()
    bound = grammar(engine, json=schema, disable_any_whitespace=True)
    for total in (100, 200, 300):
        text = _write(bound, total, rng)
        assert text is not None and len(text) <= total
        jsonschema.validate(json.loads(text), schema)
        assert len(text) > total // 3 or schema == {}  # and not before it has to


@pytest.mark.parametrize("engine", ["auto", "guidance"])
def test_a_character_that_was_begun_is_ended_first(engine: str) -> None:
    rng = random.Random()
    for schema in ({"type": "object"}, TREE):
        bound = grammar(engine, json=schema, disable_any_whitespace=True)
        for total in range(60, 100):
            text = _write(bound, total, rng, is_foreign=True)
            assert text is not None
            jsonschema.validate(json.loads(text), schema)


def test_random_schemas_end_in_time() -> None:
    rng, ended = random.Random(), 0
    for index in range(40):
        schema = random_schema(rng, index % 4)
        text = _write(grammar(json=schema, disable_any_whitespace=True), 300, rng)
        ended += text is not None
        assert text is None or jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    assert ended == 40


@pytest.mark.parametrize(
    "bounds",
    [
        {"exclusiveMinimum": 0},
        {"minimum": -1, "maximum": 9},
        {"minimum": 1, "multipleOf": 15},
        {"minimum": 1, "multipleOf": 1024},
    ],
)
def test_a_number_that_more_zeros_do_not_end_is_ended(bounds: dict[str, Any]) -> None:
    members = {"text": {"type": "string"}, "n": {"type": "number"} | bounds}
    schema = {"type": "object", "properties": members, "required": ["text", "n"]}
    rng, bound = random.Random(), grammar("guidance", json=schema, disable_any_whitespace=True)
    for total in (100, 200, 300):
        text = _write(bound, total, rng)
        assert text is not None
        jsonschema.validate(json.loads(text, parse_float=Decimal), schema)


def test_no_call_is_begun_that_cannot_end() -> None:
    """Nor is whitespace written without end: a call takes 60 tokens or many more here."""
    tools = {"f": TREE, "a_function_with_a_long_name": LONG}
    envelope = TOOL_PARSERS.load("hermes").envelope
    assert envelope is not None
    bound = grammar(structural_tag={"format": forced_calls(envelope, tools, None, True)})
    rng = random.Random()
    for total in (300, 300, 600, 600):
        text = _write(bound, total, rng)
        assert text is not None and text.count(b"<tool_call>") == text.count(b"</tool_call>") > 0


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_forced_calls_end_in_time_in_every_format(name: str) -> None:
    tools: dict[str, dict[str, Any]] = {"f": ARGUMENTS, "g": {}}
    envelope = TOOL_PARSERS.load(name).envelope
    assert envelope is not None
    if name == "minimax_m3" or envelope.literals:  # where strings have no bounds
        tools["f"] = ARGUMENTS | {"properties": {"s": {"type": "string"}}}
    bound = grammar(structural_tag={"format": forced_calls(envelope, tools, None, True)})
    rng = random.Random()
    for total in (400, 500, 600):
        text = _write(bound, total, rng)
        assert text is not None
        found = Output(name, tools=tools).parse(text.decode())
        assert found.calls and not found.content
        for called, value in loaded(found):
            jsonschema.validate(value, tools[called])


def test_the_end_of_a_raw_text_that_was_begun_is_written_on() -> None:
    """Where it is too late for anything else; another letter makes it text."""
    envelope = TOOL_PARSERS.load("minimax_m2").envelope
    assert envelope is not None
    tag = forced_calls(envelope, {"f": ARGUMENTS}, None, False)
    bound = grammar(structural_tag={"format": tag})
    text = b'<minimax:tool_call>\n<invoke name="f">\n<parameter name="s">see </para'
    way_out = b"</parameter></invoke>\n</minimax:tool_call>"
    for spare, wanted in ((3, way_out.removeprefix(b"</para")), (10, b"xxxxxxx" + way_out)):
        matcher, words, out = bound.start(), np.zeros(WORDS, np.int32), bytearray()
        way = Way(_closing(), "raw", matcher, 400)
        for byte in text:
            assert matcher.accept(byte)
            way.took(byte)
        for left in range(len(way_out) + 1 + spare, 0, -1):
            matcher.fill(words)
            way.narrow(matcher, words, left)
            tokens = allowed(words)
            if tokens == [EOS]:
                break
            out.append(tokens[0] if len(tokens) == 1 else ord("x"))
            assert matcher.accept(out[-1])
            way.took(out[-1])
        assert out == wanted


@pytest.mark.parametrize("total", [150, 250, 350])
@pytest.mark.parametrize("name", ["hermes", "qwen3_coder"])
def test_a_call_behind_reasoning_ends_in_time(name: str, total: int) -> None:
    """However little is left of the tokens when that is over."""
    envelope = TOOL_PARSERS.load(name).envelope
    assert envelope is not None
    tools = {"f": {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}}
    bound = grammar(
        structural_tag={"format": forced_calls(envelope, tools, Thought("", "</think>"), True)}
    )
    rng = random.Random()
    for length in range(0, total - 120, 7):
        thought = b"x" * length + b"</think>"
        text = _write(bound, total, rng, first=thought)
        assert text is not None
        found = Output(name, tools=tools).parse(text.removeprefix(thought).decode())
        assert loaded(found) and not found.content


def _way_out(name: str, thought: Thought | None, *words: str) -> str:
    """From the start of a forced call, where these are tokens beside the bytes."""
    tokens = [*BYTES.tokens[:256], *(word.encode() for word in words), b""]
    vocabulary = Vocabulary(tokens, [len(tokens) - 1])
    envelope = TOOL_PARSERS.load(name).envelope
    assert envelope is not None
    tag = forced_calls(envelope, {"f": {}}, thought, True)
    spec = prepare(StructuredOutputsParams(structural_tag={"format": tag}), "auto")
    backend = XGrammarBackend(vocabulary)
    path = Closing(vocabulary).walk(backend.load(spec, backend.compile(spec)).start(), 256)
    assert path is not None
    return b"".join(tokens[token] for token in path).decode()


def test_where_two_tokens_begin_alike_either_may_lead_out() -> None:
    """Of the texts that a forced call may begin with, reasoning is not closed."""
    assert "<tool_call>" in _way_out("hermes", Thought("<think>", "</think>"), "think", "tool")


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_no_second_call_is_on_the_way_out(name: str) -> None:
    """However its markers are spelled."""
    for words in ([], ["_begin", "▁begin"]):
        text = _way_out(name, None, *words)
        assert Output(name, tools={"f": {}}).parse(text) == Parsed(calls=[("f", "{}")])


def test_text_that_is_no_json_is_cut_where_it_is() -> None:
    envelope = TOOL_PARSERS.load("hermes").envelope
    assert envelope is not None
    tag = free_calls(envelope, "<tool_call>", {"f": TREE}, None, True)
    matcher, words = grammar(structural_tag={"format": tag}).start(), np.zeros(WORDS, np.int32)
    way = Way(_closing(), "free", matcher, 20)
    for left, byte in zip(range(20, 0, -1), b'it said: "no end yet', strict=True):
        matcher.fill(words)
        before = words.copy()
        way.narrow(matcher, words, left)
        assert (words == before).all()
        assert matcher.accept(byte)
        way.took(byte)


class Fork(Matcher):
    """`x` leads to where nothing is allowed, `y` to the end, if there is one."""

    def __init__(self, text: bytes = b"", has_end: bool = True) -> None:
        self.text, self.has_end = text, has_end

    def accept(self, token: int) -> bool:
        self.text += bytes([token])
        return True

    def fill(self, words: np.ndarray) -> None:
        first = [*b"xy"] if self.has_end else [*b"x"]
        bits = np.zeros(32 * WORDS, np.uint8)
        bits[{b"": first, b"y": [EOS]}.get(self.text, [])] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def ended(self) -> bool:
        return False

    def fork(self) -> "Fork":
        return Fork(self.text, self.has_end)


@pytest.mark.parametrize("has_end", [True, False])
def test_a_dead_end_is_no_way(has_end: bool) -> None:
    """It may lie beside the way of a text that is fine."""
    start = Fork(has_end=has_end)
    assert _closing().walk(start, 20) == ([ord("y")] if has_end else None)


def test_what_cannot_end_is_left_alone() -> None:
    matcher = grammar(json={"type": "string", "minLength": 100}).start()
    way = Way(_closing(), "long", matcher, 51)
    assert matcher.accept(ord('"'))
    words = np.zeros(WORDS, np.int32)
    matcher.fill(words)
    before = words.copy()
    way.narrow(matcher, words, 50)
    assert (words == before).all()
