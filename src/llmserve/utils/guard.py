# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The one place where code that may fail for one request is kept from failing for all."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def guarded(call: Callable[[], T], on_error: Callable[[Exception], T]) -> T:
    """`call()`, or what `on_error` makes of any exception of it (it may raise another)."""
    try:
        return call()
    except Exception as error:  # boundary: one request's code, or a library that raises anything
        return on_error(error)
