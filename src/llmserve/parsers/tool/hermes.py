# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Hermes 2 Pro, Qwen 2.5 and 3, Granite 4: JSON objects in `<tool_call>` tags."""

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_calls import JsonCalls


class Hermes(JsonCalls):
    """`<tool_call>{"name": "f", "arguments": {}}</tool_call>`, a pair of tags each."""

    openers = ("<tool_call>",)
    closer = "</tool_call>"
    markers = ("<tool_call>", "</tool_call>")
    envelope = Envelope(
        '<tool_call>\n{"name": "{name}", "arguments": ', "}\n</tool_call>", between="\n"
    )


class Longcat(JsonCalls):
    """The same in LongCat's tags."""

    openers = ("<longcat_tool_call>",)
    closer = "</longcat_tool_call>"
    markers = ("<longcat_tool_call>", "</longcat_tool_call>")
    envelope = Envelope(
        '<longcat_tool_call>\n{"name": "{name}", "arguments": ',
        "}\n</longcat_tool_call>",
        between="\n",
    )
