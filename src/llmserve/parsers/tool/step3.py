# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Step 3: `<steptml:invoke name="F">` between markers of its own."""

import re

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.xml_calls import XmlCalls, quoted

_BEGIN, _SEP, _END = "<｜tool_call_begin｜>", "<｜tool_sep｜>", "<｜tool_call_end｜>"
_SECTION, _SECTION_END = "<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"


class Step3(XmlCalls):
    """`<|tool_call_begin|>function<|tool_sep|>`, with wide bars, then the call in tags."""

    openers = (_SECTION, _BEGIN)
    closers = (_SECTION_END,)
    markers = (_SECTION, _SECTION_END, _BEGIN, _SEP, _END)
    call_opener, call_closer = _BEGIN, _END
    call = re.compile(
        rf"\s{{0,8}}function\s{{0,8}}{_SEP}\s{{0,8}}<steptml:invoke"
        + quoted("name", "name")
        + r"\s{0,8}>"
    )
    argument_opener, argument_closer = "<steptml:parameter", "</steptml:parameter>"
    argument = re.compile(quoted("name", "key") + r"\s{0,8}>")
    envelope = Envelope(
        _BEGIN + "function" + _SEP + '<steptml:invoke name="{name}">\n',
        "</steptml:invoke>" + _END,
        style="step3_xml",
        before=_SECTION + "\n",
        between="\n",
        after="\n" + _SECTION_END,
    )
