# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""On whose behalf requests are sent to the engine, for all that one HTTP request sends.

A context variable, so that no route can forget to hand it on.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from llmserve.kv_cache.prefix_hash import digest


@dataclass(frozen=True)
class Caller:
    """`deadline` is in time.monotonic() seconds, 0 for none. `tenant` counts API keys from 0.

    `salt` names those who may share cached prefixes, b"" for all. Priorities below
    `least_priority`, which would go first, become it.
    """

    deadline: float = 0.0
    tenant: int = 0
    salt: bytes = b""
    least_priority: int | None = None

    def salted(self, cache_salt: str) -> str:
        """The request's own salt, under the caller's."""
        if not self.salt:
            return cache_salt
        return digest(b"llmserve.tenant", self.salt, cache_salt.encode()).hex()

    def bounded(self, priority: int) -> int:
        """The priority that the caller may have."""
        return priority if self.least_priority is None else max(priority, self.least_priority)


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  it is frozen
