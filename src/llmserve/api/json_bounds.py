# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Depth and number of values of JSON text, counted as its bytes arrive.

A parser makes 64 bytes of memory out of each `{}` and a frame of its stack out of each `[`: what
would not be a sensible request is refused before anything is parsed.
"""

import re

import numpy as np

from llmserve.errors import RequestError

MAX_DEPTH = 128
MAX_CONTAINERS = 100_000  # arrays and objects
MAX_VALUES = 2 << 20

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"')
_OTHERS = bytes(sorted(set(range(256)) - set(b'"{}[],')))
_STEP = np.zeros(256, np.int8)
_STEP[[*b"{["]] = 1
_STEP[[*b"}]"]] = -1


class JsonBounds:
    """`feed` raises RequestError at the first byte too many; what is no JSON passes or fails."""

    def __init__(self) -> None:
        self._in_string = False
        self._cut_escape = False  # the last chunk ended between a backslash and what it escapes
        self._depth = 0
        self._num_containers = 0
        self._num_values = 0

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the text."""
        if self._cut_escape:
            chunk, self._cut_escape = chunk[1:], not chunk
        if b"\\" in chunk:
            chunk = _ESCAPE.sub(b"", chunk)
            if chunk.endswith(b"\\"):
                self._cut_escape = True
        marks = chunk.translate(None, _OTHERS)
        if self._in_string:
            _, quote, marks = marks.partition(b'"')
            if not quote:
                return
        marks = _STRING.sub(b"", marks)
        marks, quote, _ = marks.partition(b'"')
        self._in_string = bool(quote)
        if marks:
            self._count(marks)

    def _count(self, marks: bytes) -> None:
        self._num_containers += marks.count(b"{") + marks.count(b"[")
        self._num_values += marks.count(b",")
        depths = _STEP[np.frombuffer(marks, np.uint8)].cumsum(dtype=np.int64) + self._depth
        self._depth = int(depths[-1])
        if depths.max() > MAX_DEPTH:
            raise _refusal(f"is nested too deeply: over {MAX_DEPTH} levels")
        if self._num_containers > MAX_CONTAINERS:
            raise _refusal(f"has more than {MAX_CONTAINERS} arrays and objects")
        if self._num_values > MAX_VALUES:
            raise _refusal(f"has more than {MAX_VALUES} values")


def _refusal(what: str) -> RequestError:
    return RequestError(f"The request body {what}.", code="json_too_complex")
