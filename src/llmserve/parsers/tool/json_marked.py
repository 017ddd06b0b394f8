# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""JSON calls whose formats differ in nothing but their markers."""

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_calls import JsonCalls

_NAMED = '{"name": "{name}", "arguments": '


class Phi4Mini(JsonCalls):
    """Phi-4 mini: `functools[{"name": "f", "arguments": {}}]`."""

    openers = ("functools",)
    envelope = Envelope(_NAMED, "}", before="functools[", between=", ", after="]")


class Internlm(JsonCalls):
    """InternLM 2: `<|action_start|><|plugin|>{"name": "f", "parameters": {}}<|action_end|>`."""

    openers = ("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>")
    closer = "<|action_end|>"
    markers = ("<|action_start|>", "<|plugin|>", "<|action_end|>")
    envelope = Envelope(
        '<|action_start|><|plugin|>{"name": "{name}", "parameters": ', "}<|action_end|>"
    )


class Jamba(JsonCalls):
    """Jamba, Hunyuan: `<tool_calls>[{"name": "f", "arguments": {}}]</tool_calls>`."""

    openers = ("<tool_calls>",)
    closer = "</tool_calls>"
    markers = ("<tool_calls>", "</tool_calls>")
    envelope = Envelope(_NAMED, "}", before="<tool_calls>[", between=", ", after="]</tool_calls>")


class Granite20b(JsonCalls):
    """Granite 20B: `<function_call> {"name": "f", "arguments": {}}`, without an end marker."""

    openers = ("<function_call>",)
    markers = ("<function_call>",)
    envelope = Envelope("<function_call> " + _NAMED, "}", between="\n")


class CohereCommand3(JsonCalls):
    """Command A: `<|START_ACTION|>[{"tool_name": "f", "parameters": {}}]<|END_ACTION|>`."""

    openers = ("<|START_ACTION|>",)
    closer = "<|END_ACTION|>"
    markers = ("<|START_ACTION|>", "<|END_ACTION|>")
    envelope = Envelope(
        '{"tool_name": "{name}", "parameters": ',
        "}",
        before="<|START_ACTION|>[",
        between=", ",
        after="]<|END_ACTION|>",
    )
