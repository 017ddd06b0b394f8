# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""MiniMax M3: arguments are elements that are named after them, and nest."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_text import dumps
from llmserve.parsers.reader import Markers, Reader, Step
from llmserve.parsers.schema_values import to_json, types_of
from llmserve.parsers.xml_calls import XmlCalls, quoted

_NS = "]<]minimax[>["  # before every tag
_SECTION, _SECTION_END = f"{_NS}<tool_call>", f"{_NS}</tool_call>"
_CALL, _CALL_END = f"{_NS}<invoke", f"{_NS}</invoke>"
_HEAD = re.compile(quoted("name", "name") + r"\s{0,8}>")
_TAG = re.compile(r"<(?P<end>/?)(?P<name>[^<>]+)>")
_DEPTH = 64


class _Element(NamedTuple):
    name: str
    text: list[str]
    children: "list[_Element]"


class MinimaxM3(XmlCalls):
    """`<tool_call>` around `<invoke name="F"><K>` text or elements `</K></invoke>`, and before each
    tag `]<]minimax[>[`. Items of an array are `<item>`. A call is held until its end.
    """

    openers, closers = (_SECTION, _CALL), (_SECTION_END,)
    call_opener = _CALL
    markers = (_NS,)
    envelope = Envelope(
        f'{_CALL} name="{{name}}">',
        _CALL_END,
        style="minimax_m3_xml",
        before=f"{_SECTION}\n",
        between="\n",
        after=f"\n{_SECTION_END}",
    )

    def read_call(self, reader: Reader) -> Step[bool]:
        """See XmlCalls."""
        head = yield from reader.match(_HEAD)
        name = head["name"].strip() if head else ""
        if not reader.allows(name):
            return False
        pieces: list[str] = []
        ends = Markers((_CALL_END, _CALL, _SECTION_END))
        found = yield from reader.until(ends, pieces.append, frozenset((_CALL, _SECTION_END)))
        root = _tree("".join(pieces)) if found or reader.complete else None
        if root is None:
            return False
        reader.commit()
        reader.call(name)
        reader.arguments(_object(root, self.tools.get(name, {})))
        return True


def _tree(body: str) -> _Element | None:
    """What stands in a call; None if it nests too deeply. What was not closed ends with the call,
    and what closes nothing is text."""
    open_ = [_Element("", [], [])]
    first, *rest = body.split(_NS)
    open_[0].text.append(first)
    for piece in rest:
        tag = _TAG.match(piece)
        name = tag["name"].strip() if tag else ""
        if tag is None or (tag["end"] and name not in [one.name for one in open_[1:]]):
            open_[-1].text.append(piece)
            continue
        if tag["end"]:
            while open_.pop().name != name:
                pass
        else:
            child = _Element(name, [], [])
            open_[-1].children.append(child)
            open_.append(child)
        if len(open_) > _DEPTH:
            return None
        open_[-1].text.append(piece[tag.end() :])
    return open_[0]


def _object(element: _Element, schema: Any) -> str:
    values = {child.name: _value(child, schema) for child in element.children}
    return "{" + ", ".join(f"{dumps(name)}: {value}" for name, value in values.items()) + "}"


def _value(element: _Element, parent: Any) -> str:
    """JSON of a member of `parent`, a schema."""
    parent = parent if isinstance(parent, Mapping) else {}
    types = types_of(parent, element.name)
    properties = parent.get("properties")
    own = properties.get(element.name) if isinstance(properties, Mapping) else None
    own = own if isinstance(own, Mapping) else {}
    text = "".join(element.text)
    is_empty = not element.children and not text.strip() and "string" not in types
    is_list = all(child.name == "item" for child in element.children)
    if ("array" in types and (element.children or is_empty)) or (
        element.children and is_list and "object" not in types
    ):
        items = {"properties": {child.name: own.get("items") for child in element.children}}
        return "[" + ", ".join(_value(child, items) for child in element.children) + "]"
    if element.children or ("object" in types and is_empty):
        return _object(element, own)
    return to_json(text, types)
