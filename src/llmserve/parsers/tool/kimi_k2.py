# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Kimi K2: each call has an id in the text, `functions.NAME:IDX`."""

import re

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.named_calls import NamedCalls


class KimiK2(NamedCalls):
    """The id is kept as it is; the name in it may hold dots and colons."""

    openers = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    begin, end = "<|tool_call_begin|>", "<|tool_call_end|>"
    section_end = "<|tool_calls_section_end|>"
    markers = (*openers, "<|tool_call_argument_begin|>", end, section_end)
    envelope = Envelope(
        "<|tool_call_begin|>functions.{name}:",
        "<|tool_call_end|>",
        before="<|tool_calls_section_begin|>",
        after="<|tool_calls_section_end|>",
        numbered="<|tool_call_argument_begin|>",
    )
    head = re.compile(
        r"\s*(?P<id>(functions\.)?(?P<name>[^\s<]+?)(:\d+)?)\s*"
        r"<\|tool_call_argument_begin\|>\s{0,8}(?={)"
    )
