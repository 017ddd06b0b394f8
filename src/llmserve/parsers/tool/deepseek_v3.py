# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""DeepSeek V3, R1 and V3.1: tokens with full-width bars around each call and around all."""

import re
from typing import ClassVar

from llmserve.parsers.call_grammar import Envelope
from llmserve.parsers.named_calls import NamedCalls

_SECTION = "<｜tool▁calls▁begin｜>"
_BEGIN = "<｜tool▁call▁begin｜>"
_SEP = "<｜tool▁sep｜>"
_END = "<｜tool▁call▁end｜>"
_SECTION_END = "<｜tool▁calls▁end｜>"


class DeepseekV31(NamedCalls):
    """`NAME <sep> {}`."""

    openers = (_SECTION, _BEGIN)
    markers = (_SECTION, _BEGIN, _SEP, _END, _SECTION_END)
    envelope: ClassVar[Envelope | None] = Envelope(
        f"{_BEGIN}{{name}}{_SEP}", _END, before=_SECTION, after=_SECTION_END
    )
    begin, end, section_end = _BEGIN, _END, _SECTION_END
    head = re.compile(rf"\s*(?P<name>[^\s<]+)\s*{_SEP}\s{{0,8}}(?={{)")


class DeepseekV3(DeepseekV31):
    """`TYPE <sep> NAME`, a newline, and the object in a json code fence."""

    head = re.compile(rf"\s*\w*\s*{_SEP}\s*(?P<name>[^\s<`]+)\s*```(json)?\s{{0,8}}(?={{)")
    envelope = Envelope(
        f"{_BEGIN}function{_SEP}{{name}}\n```json\n",
        f"\n```{_END}",
        before=_SECTION,
        between="\n",
        after=_SECTION_END,
    )
