# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Outputs through parsers: whole, in pieces, and as hypothesis makes them up."""

import json
import random
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hypothesis import settings
from hypothesis import strategies as st

from llmserve.core.outputs import Part
from llmserve.parsers.base import OutputParser
from llmserve.parsers.registry import REASONING_PARSERS, TOOL_PARSERS, Parsers

settings.register_profile("parsers", deadline=None)  # a busy machine is no failure
settings.load_profile("parsers")

MARKERS = sorted(
    {m for name in TOOL_PARSERS for m in (*TOOL_PARSERS.load(name).markers,)}
    | {m for name in TOOL_PARSERS for m in TOOL_PARSERS.load(name).openers}
    | {m for name in REASONING_PARSERS for m in REASONING_PARSERS.load(name).markers}
    | {"```", "</function>", "</invoke>", "```json", "[ARGS]", "; ", "\\", '"', "}}", "]", "\n"}
)
NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_\-]{0,20}", fullmatch=True)
TEXTS = st.lists(st.one_of(st.text(max_size=8), st.sampled_from(MARKERS)), max_size=6).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)
PLAIN = st.from_regex(
    r"([A-Za-z0-9\u00e9\u4e2d\U0001f600,.!?]([A-Za-z .,\n]{0,20}[a-z!?])?)?", fullmatch=True
)


class Parsed(NamedTuple):
    """What an output amounts to; a call is its name and its arguments' text."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = []


class Output(NamedTuple):
    """How an output is to be parsed."""

    tool: str | None = None
    reasoning: str | None = None
    tools: Mapping[str, Mapping[str, Any]] = {}
    prompt: str = ""
    continued: bool = False

    def parser(self) -> OutputParser:
        """A fresh one."""
        return Parsers(
            TOOL_PARSERS.load(self.tool) if self.tool else None,
            REASONING_PARSERS.load(self.reasoning) if self.reasoning else None,
        ).make(self.tools if self.tool else None, self.prompt, self.continued)

    def parse(self, *pieces: str, complete: bool = True) -> Parsed:
        """The pieces, joined again."""
        parser = self.parser()
        parts = [part for piece in pieces for part in parser.feed(piece)]
        return join(parts + parser.finish(complete))

    def check_law(self, text: str, *, every_cut: bool = True) -> Parsed:
        """The whole text, after asserting that no way to cut it changes the result."""
        whole = self.parse(text)
        assert self.parse(*text) == whole
        rng = random.Random(text)
        cuts = sorted(rng.sample(range(len(text)), min(len(text), 5)))
        assert self.parse(*pieces(text, cuts)) == whole
        for at in range(1, len(text)) if every_cut else ():
            assert self.parse(text[:at], text[at:]) == whole, at
            head = text[:at]
            complete = bool(at % 2)
            assert self.parse(*head, complete=complete) == self.parse(head, complete=complete), at
        return whole


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
    """`text` cut at the given positions."""
    edges = [0, *cuts, len(text)]
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def join(parts: list[Part]) -> Parsed:
    """Parts as a client would join them; asserts the order that streams promise."""
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[tuple[str, list[str]]] = []
    for part in parts:
        assert part.text
        if part.kind == "content":
            content.append(part.text)
        elif part.kind == "reasoning":
            reasoning.append(part.text)
        elif part.kind == "call":
            assert part.index == len(calls)
            calls.append((part.text, []))
        else:
            assert part.index == len(calls) - 1, "a call goes on after the next has begun"
            calls[part.index][1].append(part.text)
    return Parsed(
        "".join(content),
        "".join(reasoning),
        [(name, "".join(fragments)) for name, fragments in calls],
    )


def loaded(parsed: Parsed) -> list[tuple[str, Any]]:
    """The calls with their arguments as values; every one must be JSON."""
    return [(name, json.loads(text)) for name, text in parsed.calls]


def soup(*fragments: str) -> st.SearchStrategy[str]:
    """Texts that look like a format and are broken in every way."""
    common = ["x", " ", "\n", '"', "\\", "{", "}", "[", "]", ",", ":", "(", ")", "<", ">", "é", "f"]
    common += ['{"name": "f", "arguments": {', '"a": 1', '"name"', "f(a=1", "1", "null", "}}"]
    return st.lists(st.sampled_from([*fragments, *common]), max_size=14).map("".join)
