# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a parser understood, in the fields of messages and of deltas."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from llmserve.api.generation import Choice
from llmserve.core.outputs import Delta, Part

T = TypeVar("T")


class View(NamedTuple):
    """How an answer shows what was understood."""

    reasoning: tuple[str, ...]  # the fields that carry it; none hides it
    parses: bool  # there is a parser
    named: bool = False  # the client named the tool: `finish_reason` stays "stop"
    on_end: Callable[[bool], None] | None = None  # a choice, with or without calls

    @classmethod
    def of(
        cls,
        field: str,
        include: bool,
        parses: bool,
        named: bool,
        on_end: Callable[[bool], None] | None = None,
    ) -> "View":
        """From the server's --reasoning-field and the request's include_reasoning."""
        fields = ("reasoning", "reasoning_content") if field == "both" else (field,)
        return cls(fields if include else (), parses, named, on_end)

    def message(self, choice: Choice) -> dict[str, Any]:
        """The fields of a whole message that follow from its parts."""
        reasoning: list[str] = []
        calls: list[dict[str, Any]] = []
        arguments: list[list[str]] = []
        for part in choice.parts:
            if part.kind == "reasoning":
                reasoning.append(part.text)
            elif part.kind == "call":
                calls.append(_call(part))
                arguments.append([])
            elif part.kind == "arguments":
                arguments[part.index].append(part.text)
        for call, pieces in zip(calls, arguments, strict=True):
            call["function"]["arguments"] = "".join(pieces)
        fields: dict[str, Any] = {"content": choice.text}
        if not choice.text and (calls or reasoning):
            fields["content"] = None
        if calls:
            fields["tool_calls"] = calls
        if reasoning:
            fields |= dict.fromkeys(self.reasoning, "".join(reasoning))
        return fields

    def delta(self, delta: Delta) -> dict[str, Any]:
        """The fields of one chunk; empty if nothing of it is shown."""
        fields: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        reasoning = ""
        for part in delta.parts:
            if part.kind == "reasoning":
                reasoning += part.text
            elif part.kind == "call":
                calls.append({"index": part.index, **_call(part)})
            elif part.kind == "arguments":
                if not calls or calls[-1]["index"] != part.index:
                    calls.append({"index": part.index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += part.text
        if reasoning:
            fields |= dict.fromkeys(self.reasoning, reasoning)
        if delta.text:
            fields["content"] = delta.text
        if calls:
            fields["tool_calls"] = calls
        return fields

    def finish_reason(self, reason: str | None, stop: int | str | None, calls: bool) -> str | None:
        """ "tool_calls" if there are `calls` and the model ended by itself; None while it goes
        on."""
        if reason is not None and self.on_end is not None:
            self.on_end(calls)
        if reason == "stop" and calls and not self.named and not isinstance(stop, str):
            return "tool_calls"
        return reason

    def shown(self, items: list[T], hidden: list[bool]) -> list[T]:
        """Of one item a token, those that may be seen."""
        if self.reasoning or not hidden:
            return items
        return [item for item, hide in zip(items, hidden, strict=False) if not hide]


def _call(part: Part) -> dict[str, Any]:
    return {"id": part.id, "type": "function", "function": {"name": part.text, "arguments": ""}}
