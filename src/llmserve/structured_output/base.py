# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What a grammar engine is.

A backend compiles in a child process that may be killed at any time; what it makes there crosses as
bytes and is loaded in the engine's process, where each request walks through it by itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.structured_output.vocabulary import Vocabulary


class Matcher(ABC):
    """Where one request stands in its grammar."""

    @abstractmethod
    def accept(self, token: int) -> bool:
        """Takes one token that the mask allowed; False if the grammar does not allow it here."""

    @abstractmethod
    def fill(self, words: np.ndarray) -> None:
        """Writes the tokens that may come next into `words` int32 [ceil(logits_width / 32)], bit
        t % 32 of word t // 32 being token t. End tokens only where the text may end."""

    @classmethod
    def fill_all(cls, matchers: Sequence[Self], words: np.ndarray, rows: list[int]) -> None:
        """Each one's `fill` into its row of `words` [n, ...]. What one raises is raised, whatever
        became of the others."""
        for matcher, row in zip(matchers, rows, strict=True):
            matcher.fill(words[row])

    @abstractmethod
    def ended(self) -> bool:
        """Whether an end token was accepted, or nothing else is left: `fill` may not be called."""

    @abstractmethod
    def fork(self) -> "Matcher":
        """Another one at the same place, which goes its own way."""


class CompiledGrammar(ABC):
    """A grammar that requests can walk through."""

    @abstractmethod
    def start(self) -> Matcher:
        """At the beginning of the text."""


class GrammarBackend(ABC):
    """One grammar engine over one vocabulary. Methods may be called from several threads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    @abstractmethod
    def compile(self, spec: GrammarSpec) -> bytes:
        """In the child; GrammarError, or whatever the library raises, if it cannot."""

    @abstractmethod
    def load(self, spec: GrammarSpec, compiled: bytes) -> CompiledGrammar:
        """In the engine: what `compile` made of `spec`."""
