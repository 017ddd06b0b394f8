# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""MiniMax M2: `<invoke name="F">` in `<minimax:tool_call>` tags."""

import re

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.xml_calls import XmlCalls, quoted


class MinimaxM2(XmlCalls):
    """Attributes have double, single or no quotes; values are verbatim."""

    openers = ("<minimax:tool_call>", "<invoke")
    closers = ("</minimax:tool_call>",)
    markers = ("<minimax:tool_call>", "</minimax:tool_call>")
    call_opener, call_closer = "<invoke", "</invoke>"
    call = re.compile(quoted("name", "name") + r"\s{0,8}>")
    argument_opener, argument_closer = "<parameter", "</parameter>"
    argument = re.compile(quoted("name", "key") + r"\s{0,8}>")
    envelope = Envelope(
        '<invoke name="{name}">\n',
        "</invoke>\n",
        style="minimax_xml",
        before="<minimax:tool_call>\n",
        after="</minimax:tool_call>",
    )
