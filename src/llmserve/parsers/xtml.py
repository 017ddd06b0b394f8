# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Kimi K3's XTML: a message is blocks `<|open|>NAME<|sep|>` text `<|close|>NAME<|sep|>`."""

from collections.abc import Callable

from llmserve.parsers.reader import Markers, Reader, Step

OPEN, CLOSE, SEP, END = "<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"
MARKERS = (OPEN, CLOSE, SEP, END)
THINK, THINK_END = f"{OPEN}think{SEP}", f"{CLOSE}think{SEP}"
RESPONSE, RESPONSE_END = f"{OPEN}response{SEP}", f"{CLOSE}response{SEP}"
TOOLS, TOOLS_END = f"{OPEN}tools{SEP}", f"{CLOSE}tools{SEP}"
MESSAGE_END = f"{CLOSE}message{SEP}"

_EDGES = (THINK, THINK_END, RESPONSE, RESPONSE_END, MESSAGE_END, END)
_NO_CALLS = Markers(_EDGES)
_CALLS = Markers((*_EDGES, TOOLS))


def read_xtml(
    reader: Reader, inside: bool, read_calls: Callable[[Reader, str], Step[None]] | None
) -> Step[None]:
    """Reads a message; `inside` is whether it begins inside reasoning. Without `read_calls`, which
    reads behind a recorded opener of the block of calls, that block is content."""
    if inside:
        reader.begin_reasoning()
    while True:
        sink = reader.reasoning if reader.in_reasoning else reader.content
        found = yield from reader.until(_CALLS if read_calls else _NO_CALLS, sink)
        if not found:
            return
        if found == THINK and not reader.in_reasoning:
            reader.begin_reasoning()
        elif found != THINK and reader.in_reasoning:
            reader.end_reasoning()
        if found == TOOLS and read_calls is not None:
            reader.record(TOOLS)
            yield from read_calls(reader, TOOLS)
