# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput
from llmserve.core.structured_outputs import StructuredOutputsParams
from llmserve.structured_output.base import CompiledGrammar, GrammarBackend
from llmserve.structured_output.compiler import Tables
from llmserve.structured_output.free_strings import FreeStrings
from llmserve.structured_output.manager import GrammarManager, GrammarRow
from llmserve.structured_output.normal_form import has_free_strings
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.registry import BACKENDS
from llmserve.structured_output.vocabulary import Vocabulary
from tests.helpers.grammar import BYTES, EOS, WORDS, random_schema

STRING = {"type": "string"}
FREE: list[Any] = [
    STRING,
    {},
    {"type": "object"},
    {"type": "array", "items": STRING, "maxItems": 4},
    {"properties": {"a": STRING, "bc": {"enum": ["x", "yy"]}, "d": {}}, "required": ["bc"]},
    {"properties": {"a": {"type": ["string", "null", "integer"]}}, "required": ["a"]},
    {"type": "array", "prefixItems": [STRING, {"const": "ab"}, {}], "items": STRING},
    {
        "$ref": "#/$defs/x",
        "$defs": {"x": {"properties": {"k": STRING, "x": {"$ref": "#/$defs/x"}}}},
    },
]
BOUND: list[tuple[Any, str]] = [  # and a text after which the mask is not what it was at its |
    ({"type": "string", "maxLength": 3}, '"|ab'),
    ({"type": "string", "minLength": 2}, '"|ab'),
    ({"type": "string", "pattern": "^.*a$"}, '"|a'),
    ({"anyOf": [{"const": "ab"}, {"type": "array", "items": STRING}]}, '|"a'),
    ({"properties": {"a": STRING}, "additionalProperties": {"type": "integer"}}, '{"|a'),
    (
        {"anyOf": [
            {"properties": {"t": {"const": "x"}, "a": STRING}, "required": ["t", "a"]},
            {"properties": {"t": STRING, "b": STRING}, "required": ["t", "b"]},
        ]},
        '{"t":"|x',
    ),
]  # fmt: skip


def _vocabulary(rng: random.Random) -> Vocabulary:
    """Every byte, and some of what JSON is made of."""
    parts = ['"', '",', '":', '"}', "}]", "a", "xy", "b", "é", "\\", "\\n", "1", " ", "\t", "t"]
    texts = {"".join(rng.choices(parts, k=rng.randint(2, 4))).encode() for _ in range(200)}
    texts |= {"é€".encode()[:3], "€".encode()[1:], b"q\xc3", b'","a"', b'","b"', b'":1'}
    made = [*BYTES.tokens[:EOS], b"", *sorted(texts)]
    return Vocabulary(made, [EOS])


def _engine(name: str, vocabulary: Vocabulary) -> GrammarBackend:
    engine: GrammarBackend = BACKENDS.load(name)(vocabulary)
    return engine


@pytest.mark.parametrize("schema", FREE, ids=str)
def test_schemas_whose_strings_are_free(schema: Any) -> None:
    assert prepare(StructuredOutputsParams(json=schema), "auto").free_strings


@pytest.mark.parametrize(("schema", "text"), BOUND, ids=str)
def test_schemas_whose_strings_are_not(schema: Any, text: str) -> None:
    spec = prepare(StructuredOutputsParams(json=schema), "guidance")
    assert not spec.free_strings
    engine = _engine("guidance", _vocabulary(random.Random()))
    matcher = engine.load(spec, engine.compile(spec)).start()
    masks = []
    for part in text.split("|"):
        for byte in part.encode():
            assert matcher.accept(byte)
        masks.append(np.zeros(-(-len(engine.vocabulary.tokens) // 32), np.int32))
        matcher.fill(masks[-1])
    assert (masks[0] != masks[1]).any()


def test_only_plain_strings_of_other_grammars_are_not_asked() -> None:
    assert not prepare(StructuredOutputsParams(regex='"[a-z]*"'), "auto").free_strings
    assert has_free_strings(False)


def test_a_vocabulary_that_lacks_a_letter_has_none() -> None:
    everything = np.full(WORDS, -1, np.int32)
    assert FreeStrings(BYTES).holds(everything)
    lacks = Vocabulary([b"" if token == b"q" else token for token in BYTES.tokens], [EOS])
    assert not FreeStrings(lacks).holds(everything)


@pytest.mark.parametrize("name", ["xgrammar", "guidance"])
def test_kept_masks_are_what_the_grammar_would_say(name: str) -> None:
    """On random ways through random schemas, with a second matcher that is asked at every step."""
    rng = random.Random()
    vocabulary = _vocabulary(rng)
    engine = _engine(name, vocabulary)
    schemas = [*FREE, *(random_schema(rng, rng.randint(0, 2)) for _ in range(30))]
    kept = 0
    for schema in schemas:
        params = StructuredOutputsParams(json=schema, strict=False)
        spec = prepare(params, name)
        made = engine.load(spec, engine.compile(spec))
        for _ in range(6):
            kept += _follow(made, SamplingParams(grammar=spec, max_tokens=500), vocabulary, rng)
    assert kept > 100


def _follow(
    made: CompiledGrammar, params: SamplingParams, vocabulary: Vocabulary, rng: random.Random
) -> int:
    """How many masks were kept on one way."""
    compiler: Any = SimpleNamespace(
        tables=Tables(vocabulary), eos_token_ids=[EOS], get=lambda spec: made
    )
    manager = GrammarManager(compiler, len(vocabulary.tokens), num_slots=2)
    message = EngineRequest(client=0, request_id=1, prompt=b"\0" * 4, params=params, arrival=0)
    request = Request(message, 1000, frozenset([EOS]))
    assert manager.enter(request.key, params)
    rows, other = [GrammarRow(0, request)], made.start()
    words, wanted = np.zeros((2, 1, -(-len(vocabulary.tokens) // 32)), np.int32)
    for _ in range(80):
        if other.ended():
            break
        assert not manager.fill({0: rows[0]}, words)
        other.fill(wanted[0])
        walk = manager._walks[request.key]
        assert walk.kept is None or (walk.kept == wanted[0]).all()
        bits = np.unpackbits(words[0].view(np.uint8), bitorder="little")
        token = rng.choice(np.flatnonzero(bits[: len(vocabulary.tokens)]).tolist())
        if token == EOS:
            break
        drawn = ModelRunnerOutput(np.array([[token]], np.int32), np.ones(1, np.int32))
        assert not manager.advance(rows, drawn)
        assert other.accept(token)
    return manager.num_kept_masks
