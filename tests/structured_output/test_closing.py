# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Texts that a careless writer would never end, within a number of tokens."""

import json
import random
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest

from llmserve.structured_output.closing import ESCAPED, IN, OUT, Closing, Way
from tests.helpers.grammar import BYTES, EOS, WORDS, allowed, grammar, random_schema

TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "of": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name", "of"],
}


@cache
def _closing() -> Closing:
    end = np.zeros(WORDS, np.int32)
    end[EOS // 32] = 1 << EOS % 32
    return Closing(BYTES, end)


def _write(schema: Any, total: int, rng: random.Random, engine: str = "auto") -> bytes | None:
    """By someone who opens what can be opened and writes on; None if it does not end."""
    matcher = grammar(engine, json=schema, disable_any_whitespace=True).start()
    way, words, out = Way(_closing(), total), np.zeros(WORDS, np.int32), bytearray()
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
        token = rng.choice(eager or printable)
        if token == EOS:
            return bytes(out)
        assert matcher.accept(token)
        way.took(token)
        out.append(token)
    return None


@pytest.mark.parametrize("engine", ["auto", "guidance"])
@pytest.mark.parametrize(
    "schema", [{"type": "object"}, {"type": "string"}, {"type": "number"}, TREE, {}]
)
def test_it_ends_in_time(schema: Any, engine: str) -> None:
    rng = random.Random()
    for total in (100, 300):
        text = _write(schema, total, rng, engine)
        assert text is not None and len(text) <= total
        jsonschema.validate(json.loads(text), schema)
        assert len(text) > total // 3 or schema == {}  # and not before it has to


def test_random_schemas_end_in_time() -> None:
    rng, ended = random.Random(), 0
    for index in range(40):
        schema = random_schema(rng, index % 4)
        text = _write(schema, 300, rng)
        ended += text is not None
        assert text is None or jsonschema.Draft202012Validator(schema).is_valid(json.loads(text))
    assert ended >= 36


def test_what_cannot_end_is_left_alone() -> None:
    matcher = grammar(json={"type": "string", "minLength": 100}).start()
    words = np.zeros(WORDS, np.int32)
    matcher.fill(words)
    before = words.copy()
    Way(_closing(), 50).narrow(matcher, words, 50)
    assert (words == before).all()


def test_after() -> None:
    place = OUT
    for char, then in zip(rb'{"a\"b":', [OUT, IN, IN, ESCAPED, IN, IN, OUT, OUT], strict=True):
        place = _closing().after(place, char)
        assert place == then
