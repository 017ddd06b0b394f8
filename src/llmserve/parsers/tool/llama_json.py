# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Llama 3 and 4: bare JSON objects, perhaps behind `<|python_tag|>`."""

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_calls import JsonCalls


class LlamaJson(JsonCalls):
    """`{"name": "f", "parameters": {}}`, several with `;` between them.

    A bare object counts at the start of the output only; one that is no call is content.
    """

    openers = ("<|python_tag|>",)
    markers = ("<|python_tag|>",)
    bare = "{"
    envelope = Envelope('{"name": "{name}", "parameters": ', "}", between="; ")
