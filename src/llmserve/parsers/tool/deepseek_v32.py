# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""DeepSeek V3.2 and V4: DSML, whose arguments say whether they are text or JSON."""

import re
from typing import ClassVar

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.schema_values import TEXT
from llmserve.parsers.xml_calls import XmlCalls, quoted

_OUTER = ("function_calls>", "tool_calls>", "toolcalls>", "tool>")


class DeepseekV32(XmlCalls):
    """`<|DSML|invoke name="F"><|DSML|parameter name="K" string="true">` text, with wide bars.

    V4 calls the outer tag `tool_calls`, with variants of its spelling. Where `string` is not true
    the text is JSON, or a string if it is none.
    """

    openers = (*(f"<｜DSML｜{name}" for name in _OUTER), "<｜DSML｜invoke")
    closers = tuple(f"</｜DSML｜{name}" for name in _OUTER)
    markers = ("｜DSML｜",)
    call_opener, call_closer = "<｜DSML｜invoke", "</｜DSML｜invoke>"
    call = re.compile(quoted("name", "name") + r"\s{0,8}>")
    argument_opener, argument_closer = "<｜DSML｜parameter", "</｜DSML｜parameter>"
    argument = re.compile(
        quoted("name", "key") + r"(\s{0,8}string=[\"']?(?P<string>true|false)[\"']?)?\s{0,8}>"
    )

    envelope: ClassVar[Envelope | None] = Envelope(
        '<｜DSML｜invoke name="{name}">\n',
        "</｜DSML｜invoke>\n",
        style="deepseek_xml",
        before="<｜DSML｜function_calls>\n",
        after="</｜DSML｜function_calls>",
    )

    def value_types(self, tag: re.Match[str], schema: object) -> frozenset[str] | None:
        """See XmlCalls."""
        return TEXT if tag["string"] == "true" else None


class DeepseekV4(DeepseekV32):
    """What grammars make for V4."""

    envelope = Envelope(
        '<｜DSML｜invoke name="{name}">\n',
        "</｜DSML｜invoke>\n",
        style="deepseek_xml",
        before="<｜DSML｜tool_calls>\n",
        after="</｜DSML｜tool_calls>",
    )


class DeepseekV41(DeepseekV32):
    """V4.1 has a space after each pair of bars."""

    openers = ("<｜DSML｜ calls>", "<｜DSML｜ invoke")
    closers = ("</｜DSML｜ calls>",)
    call_opener, call_closer = "<｜DSML｜ invoke", "</｜DSML｜ invoke>"
    argument_opener, argument_closer = "<｜DSML｜ parameter", "</｜DSML｜ parameter>"
    envelope = Envelope(
        '<｜DSML｜ invoke name="{name}">\n',
        "</｜DSML｜ invoke>\n",
        style="deepseek_v4_1_xml",
        before="<｜DSML｜ calls>\n",
        after="</｜DSML｜ calls>",
    )
