# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Qwen3-Coder, Qwen 3.5 and later, MiMo, Nemotron 3, Step 3.5, Seed-OSS: XML-like tags."""

import re
from typing import ClassVar

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.xml_calls import XmlCalls


class Qwen3Coder(XmlCalls):
    """`<tool_call><function=F><parameter=K>` text `</parameter></function></tool_call>`."""

    openers = ("<tool_call>", "<function=")
    closers = ("</tool_call>",)
    markers = ("<tool_call>", "</tool_call>")
    call_opener, call_closer = "<function=", "</function>"
    call = re.compile(r"(?P<name>[^<>\n]+)>")
    argument_opener, argument_closer = "<parameter=", "</parameter>"
    argument = re.compile(r"(?P<key>[^<>\n]+)>")
    trims_newlines = True
    envelope: ClassVar[Envelope | None] = Envelope(
        "<tool_call>\n<function={name}>\n",
        "</function>\n</tool_call>",
        style="qwen_xml",
        between="\n",
    )


class SeedOss(Qwen3Coder):
    """The outer tags are `<seed:tool_call>`."""

    openers = ("<seed:tool_call>", "<function=")
    closers = ("</seed:tool_call>",)
    markers = ("<seed:tool_call>", "</seed:tool_call>")
    envelope = Envelope(
        "<seed:tool_call>\n<function={name}>\n",
        "</function>\n</seed:tool_call>",
        style="qwen_xml",
        between="\n",
    )
