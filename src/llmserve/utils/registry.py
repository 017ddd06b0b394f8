# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Names to implementations, imported at first use. The only importlib call of the project."""

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from llmserve.errors import ConfigError


def load(target: str) -> Any:
    """Imports `package.module:Name`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class Registry(Mapping[str, str]):
    """`name -> "package.module:Class"`; the first that fits is the automatic choice."""

    def __init__(self, kind: str, entries: dict[str, str]) -> None:
        self.kind = kind
        self._entries = entries

    def __getitem__(self, name: str) -> str:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def load(self, name: str) -> Any:
        """The class registered as `name`; ConfigError lists what there is."""
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown {self.kind} {name!r}{hint} (known: {', '.join(self._entries)})"
            )
        return load(self._entries[name])
