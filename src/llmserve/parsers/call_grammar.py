# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Grammars of tool calls in a model's own format, as xgrammar's structural tags.

They are plain data: what is made here goes to whoever compiles grammars. Names of formats are those
of xgrammar.structural_tag.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from llmserve.parsers.literal_grammar import Style, literal_grammar

Format = dict[str, Any]
Schemas = Mapping[str, Mapping[str, Any]]

_SPACE: Format = {"type": "regex", "pattern": "[ \\n]{0,4}"}
_ANY_TEXT: Format = {"type": "any_text"}
_ANY_OBJECT = {"type": "object", "properties": {}, "required": [], "additionalProperties": True}
_LITERALS: dict[str, Style] = {name: name for name in get_args(Style)}


class Thought(NamedTuple):
    """What opens and closes the reasoning that an output may begin with, no opener where it has
    begun; and what begins the answer behind it, where that is written."""

    opener: str
    closer: str
    answer: str = ""


class Envelope(NamedTuple):
    """How calls are written: `before`, then for each call `begin`, arguments, `end`, with `between`
    two of them, then `after`.

    `{name}` in `begin` is the tool. `style` is that of the arguments. Where `numbered` is set,
    digits and that text follow on `begin`. One that is `single` ends the output with its call.
    What is `answered` stands behind the answer, which stays empty.
    """

    begin: str
    end: str
    style: str = "json"
    before: str = ""
    between: str = ""
    after: str = ""
    numbered: str = ""
    single: bool = False
    answered: bool = False

    @property
    def literals(self) -> Style | None:
        """How arguments are written that are not JSON, nor tags around it."""
        return _LITERALS.get(self.style)

    def tag(self, name: str, schema: Mapping[str, Any]) -> Format:
        """One call."""
        content: Format = {
            "type": "json_schema",
            "json_schema": dict(schema) or {"type": "object"},
            "style": self.style,
        }
        if self.style == "minimax_m3_xml" and _ANY_OBJECT | dict(schema) == _ANY_OBJECT:
            content = _ANY_TEXT  # its elements need names
        if self.literals is not None:
            content = {"type": "grammar", "grammar": literal_grammar(schema, self.literals)}
        if self.numbered:
            digits = {"type": "regex", "pattern": "[0-9]{1,4}"}
            content = _sequence(digits, _text(self.numbered), content)
        return _tag(self.begin.replace("{name}", name), content, self.end)


def forced_calls(
    envelope: Envelope,
    schemas: Schemas,
    thought: Thought | None,
    parallel: bool,
) -> Format:
    """One call or, if `parallel`, several, of the tools in `schemas`, and nothing else.

    `thought` is reasoning that may come first; one without an opener must.
    """
    return _after(thought, _section(envelope, schemas, parallel, thought))


def calls_or(
    answer: Format,
    envelope: Envelope | None,
    schemas: Schemas,
    thought: Thought | None,
    parallel: bool,
) -> Format:
    """`answer`, or calls where there is an `envelope`. See `forced_calls`."""
    if thought is not None and thought.answer:
        answer = _sequence(_text(thought.answer), answer)
    if envelope is not None:
        calls = _section(envelope, schemas, parallel, thought)
        answer = {"type": "or", "elements": [calls, answer]}
    return _after(thought, answer)


def free_calls(
    envelope: Envelope,
    opener: str,
    schemas: Schemas,
    thought: Thought | None,
    parallel: bool,
) -> Format:
    """Any text; but what begins with the call's `opener` is a call of a tool in `schemas`."""
    if thought is not None and thought.answer:
        return calls_or(_ANY_TEXT, envelope, schemas, thought, parallel)
    if envelope.before:
        tags = [_tag(envelope.before, _calls(envelope, schemas, parallel), envelope.after)]
        trigger = envelope.before
    else:
        tags = [envelope.tag(name, schema) for name, schema in schemas.items()]
        trigger = envelope.begin.partition("{name}")[0]
    if trigger.startswith(opener):
        trigger = opener
    text = {
        "type": "triggered_tags",
        "triggers": [trigger],
        "tags": tags,
        "at_least_one": False,
        "stop_after_first": not parallel,
    }
    return _after(thought, text)


def _after(thought: Thought | None, rest: Format) -> Format:
    if thought is None:
        return rest
    reasoning = _tag(thought.opener, _ANY_TEXT, thought.closer)
    if thought.opener:
        reasoning = {"type": "optional", "content": reasoning}
    return _sequence(reasoning, _SPACE, rest)


def _section(
    envelope: Envelope, schemas: Schemas, parallel: bool, thought: Thought | None
) -> Format:
    calls = _calls(envelope, schemas, parallel)
    if not envelope.before:
        return calls
    answer = thought.answer if thought is not None and envelope.answered else ""
    return _sequence(_text(answer + envelope.before), calls, _text(envelope.after))


def _calls(envelope: Envelope, schemas: Schemas, parallel: bool) -> Format:
    return {
        "type": "tags_with_separator",
        "tags": [envelope.tag(name, schema) for name, schema in schemas.items()],
        "separator": envelope.between,
        "at_least_one": True,
        "stop_after_first": not parallel or envelope.single,
    }


def _text(value: str) -> Format:
    return {"type": "const_string", "value": value}


def _tag(begin: str, content: Format, end: str) -> Format:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}
