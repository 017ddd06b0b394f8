# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Grammars over a vocabulary of the 256 bytes, so that every text can be tried."""

import json
import random
from functools import cache
from typing import Any

import numpy as np

from llmserve.core.structured_outputs import GrammarSpec, StructuredOutputsParams
from llmserve.structured_output.base import CompiledGrammar, GrammarBackend
from llmserve.structured_output.prepare import prepare
from llmserve.structured_output.registry import BACKENDS
from llmserve.structured_output.vocabulary import Vocabulary

EOS = 256
BYTES = Vocabulary([*(bytes([i]) for i in range(256)), b""], [EOS])
WORDS = 9


@cache
def backend(name: str) -> GrammarBackend:
    """One over BYTES."""
    made: GrammarBackend = BACKENDS.load(name)(BYTES)
    return made


def compiled(spec: GrammarSpec) -> CompiledGrammar:
    """As the engine has it: through bytes."""
    engine = backend(spec.backend)
    return engine.load(spec, engine.compile(spec))


def grammar(backend: str = "auto", **fields: Any) -> CompiledGrammar:
    """Of StructuredOutputsParams' fields."""
    return compiled(prepare(StructuredOutputsParams(**fields), backend))


def closed_objects(parts: int, each: int) -> dict[str, Any]:
    """A schema: an object of objects, whose properties are all required, and no others allowed."""

    def of(properties: dict[str, Any]) -> dict[str, Any]:
        names = list(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": names,
            "additionalProperties": False,
        }

    kinds = {"type": "string"}, {"type": "integer"}, {"enum": ["a", "b"]}
    part = of({f"property_{i}": kinds[i % 3] for i in range(each)})
    return of({f"part_{i}": part for i in range(parts)})


def allowed(words: np.ndarray) -> list[int]:
    """Token ids."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: EOS + 1]
    return np.flatnonzero(bits).tolist()


def accepts(grammar: CompiledGrammar, text: str | bytes) -> bool:
    """Whether the text may be written and may end there; masks and `accept` must agree."""
    matcher, words = grammar.start(), np.zeros(WORDS, np.int32)
    for byte in text.encode() if isinstance(text, str) else text:
        if matcher.ended():
            return False
        matcher.fill(words)
        if byte not in allowed(words):
            return False
        assert matcher.accept(byte)
    if matcher.ended():
        return True
    matcher.fill(words)
    return EOS in allowed(words)


def accepts_json(grammar: CompiledGrammar, value: Any) -> bool:
    """`accepts` for JSON text without whitespace."""
    return accepts(grammar, json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def walk(grammar: CompiledGrammar, rng: random.Random, limit: int = 400) -> bytes | None:
    """A random text of the grammar, its end favoured; None where it is longer than `limit`."""
    matcher, words, out = grammar.start(), np.zeros(WORDS, np.int32), bytearray()
    for length in range(limit):
        if matcher.ended():
            return bytes(out)
        matcher.fill(words)
        tokens = allowed(words)
        assert tokens, f"no way on after {bytes(out)!r}"
        if EOS in tokens and (len(tokens) == 1 or rng.random() < 0.4):
            return bytes(out)
        tokens = [token for token in tokens if token != EOS]
        if length > 60 or rng.random() < 0.3:
            tokens = [t for t in tokens if t in b'"}],:'] or tokens
        printable = [t for t in tokens if 32 < t < 127]
        token = rng.choice(printable if printable and rng.random() < 0.9 else tokens)
        assert matcher.accept(token)
        out.append(token)
    return None


def random_schema(rng: random.Random, depth: int) -> dict[str, Any] | bool:
    """Grows harder with `depth`; every keyword in it can be enforced."""

    def number() -> dict[str, Any]:
        low = rng.randint(-9, 9)
        bounds = {"minimum": low, "maximum": low + rng.randint(0, 50)}
        return {"type": rng.choice(["integer", "number"])} | rng.choice([{}, bounds])

    def string() -> dict[str, Any]:
        low = rng.randint(0, 4)
        extra = [{}, {"maxLength": low + 1}, {"minLength": low}, {"pattern": "^[a-f]{2,4}$"},
                 {"format": "date"}, {"enum": ["x", "yy"]}]  # fmt: skip
        return {"type": "string"} | rng.choice(extra)

    leaves: list[Any] = [number, string, lambda: {"type": "boolean"}, lambda: {"const": [1, "a"]}]
    if depth == 0:
        return rng.choice(leaves)()
    sub = [random_schema(rng, depth - 1) for _ in range(3)]
    names = rng.sample("abcdef", 3)
    required = [name for name in names if rng.random() < 0.5]
    base: dict[str, Any] = {"type": "object", "properties": dict(zip(names, sub, strict=True))}
    return rng.choice(
        [
            base | {"required": required},
            base | {"required": required, "additionalProperties": sub[0]},
            base | {"anyOf": [{"required": [name]} for name in names]},
            base | {"if": {"required": names[:1]}, "then": {"required": names[1:2]}},
            base | {"dependentRequired": {names[0]: names[1:]}},
            {"type": "array", "items": sub[0], "maxItems": 3},
            {"type": "array", "prefixItems": sub[:2], "items": sub[2], "minItems": 1},
            {"anyOf": sub},
            {"allOf": [base, {"required": required}]},
        ]
    )
