# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Granite 3: a JSON array behind a marker, without an end."""

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_calls import JsonCalls


class Granite(JsonCalls):
    """`<|tool_call|>[{"name": "f", "arguments": {}}]`; 3.1 writes `<tool_call>` as text."""

    openers = ("<|tool_call|>", "<tool_call>")
    markers = ("<|tool_call|>", "<tool_call>")
    envelope = Envelope(
        '{"name": "{name}", "arguments": ', "}", before="<|tool_call|>[", between=", ", after="]"
    )
