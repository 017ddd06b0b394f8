# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""gpt-oss's harmony format: messages on channels, of which each output has several.

`<|channel|>analysis<|message|>` reasoning `<|end|><|start|>assistant<|channel|>final<|message|>`
content. A recipient, `to=functions.NAME`, before or after the channel, makes a message a call.
"""

import re

from llmserve.parsers.json_text import read_arguments
from llmserve.parsers.reader import Markers, Reader, Step, drop

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
MARKERS = (CHANNEL, MESSAGE, START, "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

_ALL = Markers(MARKERS)
_ENDS = Markers((CHANNEL, START, "<|end|>", "<|call|>", "<|return|>"))
_LEFT = frozenset((CHANNEL, START))
_HEAD = re.compile(
    r"\s{0,8}(<\|start\|>[a-z]*)?(\s{0,8}to=[^\s<]+)?\s{0,8}(<\|channel\|>[^<]{0,200})?"
    r"(<\|constrain\|>[^<]{0,50})?<\|message\|>"
)
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=\s*([^\s<]+)")


def read_harmony(reader: Reader, calls: bool) -> Step[None]:
    """Reads one output up to its end; calls are content unless there are `calls`."""
    while True:
        head = yield from reader.match(_HEAD)
        if head is None:
            # No message begins here: what follows is text, without the markers in it.
            if not (yield from reader.at(CHANNEL, START)) and not (yield from reader.peek()):
                return
            yield from reader.until(_ALL, reader.content, _LEFT)
            continue
        yield from _read_message(reader, head[0], calls)
        yield from reader.space()


def _read_message(reader: Reader, head: str, calls: bool) -> Step[None]:
    channel = _CHANNEL.search(head)
    recipient = _RECIPIENT.search(head)
    thinks = channel is not None and channel[1] == "analysis"
    if calls and recipient is not None:
        name = recipient[1].removeprefix("functions.")
        yield from reader.space()
        outcome = yield from read_arguments(reader, name)
        if (
            outcome == "none"
            and reader.allows(name)
            and (yield from reader.at("<|call|>", "<|end|>"))
        ):
            reader.call(name)
            reader.arguments("{}")
            return
        if outcome != "none":
            sink = reader.arguments if outcome == "torn" else drop
            yield from reader.until(_ENDS, sink, _LEFT)
            return
    if thinks:
        reader.begin_reasoning()
        yield from reader.until(_ENDS, reader.reasoning, _LEFT)
        reader.end_reasoning()
    else:
        yield from reader.until(_ENDS, reader.content, _LEFT)
