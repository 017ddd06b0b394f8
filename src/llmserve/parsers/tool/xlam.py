# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Salesforce's xLAM 2: a JSON array and no marker."""

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.json_calls import JsonCalls


class Xlam(JsonCalls):
    """`[{"name": "f", "arguments": {}}]` at the start of the output; any other array is content."""

    bare = "["
    envelope = Envelope(
        '{"name": "{name}", "arguments": ', "}", before="[", between=", ", after="]"
    )
