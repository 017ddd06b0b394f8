# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""llguidance: an Earley parser over derivatives of regular expressions; masks are computed lazily.

Its parsers cannot be written down, so the engine builds each again from its text. The child has
built it before with the same limits, and within its deadline.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from llmserve.core.structured_outputs import GrammarSpec
from llmserve.errors import GrammarError
from llmserve.structured_output.base import CompiledGrammar, GrammarBackend, Matcher
from llmserve.structured_output.schema import MAX_WHITESPACE
from llmserve.structured_output.vocabulary import Vocabulary

_LOOSE: Any = {"whitespace_pattern": rf"[ \t\n\r]{{0,{MAX_WHITESPACE}}}"}
# Of the lexer a tenth to a half of the library's own, since a mask makes its states as it goes:
# "(x{1000}){1000}" took 1.5 s of an engine's step and 170 MiB, and then could not go on
_LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000, step_lexer_fuel=100_000, max_lexer_states=50_000,
    verbose_errors=False,
)  # fmt: skip
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}


class _Tokens:
    """The shape in which llguidance reads a vocabulary; 0xff marks what is no text."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None
        self.tokens = [
            token or b"\xff[%d]" % i  # never empty: it has to name each one
            for i, token in enumerate(vocabulary.tokens)
        ]
        self.special_token_ids = [i for i, token in enumerate(vocabulary.tokens) if not token]

        self._ids = {token: i for i, token in enumerate(vocabulary.tokens) if token}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """The longest token again and again; bytes that no token begins with are left out."""
        ids, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                if (token := self._ids.get(text[start:end])) is not None:
                    ids.append(token)
                    break
            else:
                end = start + 1
            start = end
        return ids


class GuidanceBackend(GrammarBackend):
    """Nothing but the check crosses from the child."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary)
        self._tokenizer = LLTokenizer(
            TokenizerWrapper(_Tokens(vocabulary)),
            n_vocab=len(vocabulary.tokens),
            eos_token=vocabulary.eos_token_ids,
        )

    def compile(self, spec: GrammarSpec) -> bytes:
        """See GrammarBackend."""
        made = self._build(spec)
        for _ in range(2):  # one that is spent by its first mask would fail the second request
            self._warm(made)
        return b""

    def load(self, spec: GrammarSpec, compiled: bytes) -> "Guidance":
        """See GrammarBackend."""
        made = self._build(spec)
        self._warm(made)  # here, not in the engine's step
        return made

    def _warm(self, made: "Guidance") -> None:
        """All copies share the lexer's states, which the first mask makes."""
        made.start().fill(np.zeros(-(-len(self.vocabulary.tokens) // 32), np.int32))

    def _build(self, spec: GrammarSpec) -> "Guidance":
        match spec.kind:
            case "json":
                options = _COMPACT if spec.compact else _LOOSE
                text = LLMatcher.grammar_from_json_schema(spec.text, overrides=options)
            case "regex":
                text = LLMatcher.grammar_from_regex(spec.text)
            case "ebnf" | "lark":
                text = LLMatcher.grammar_from_lark(any_to_lark(spec.text))
            case "structural_tag":
                raise GrammarError("structural tags need --structured-outputs-backend xgrammar")
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise GrammarError(matcher.get_error().strip())
        return Guidance(matcher)


class Guidance(CompiledGrammar):
    """A parser at its beginning, copied for each request."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> "GuidanceMatcher":
        """See CompiledGrammar."""
        return GuidanceMatcher(self._matcher.deep_copy())


class GuidanceMatcher(Matcher):
    """An Earley parser's rows, in Rust."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def accept(self, token: int) -> bool:
        """See Matcher. GrammarError where the parser gives up."""
        fits = self._matcher.consume_token(token)
        if not fits and "doesn't satisfy the grammar" not in self._matcher.get_error():
            self._check()
        return fits

    def fill(self, words: np.ndarray) -> None:
        """See Matcher. GrammarError where the parser gives up."""
        self.fill_all([self], words.reshape(1, -1), [0])

    @classmethod
    def fill_all(cls, matchers: Sequence[Self], words: np.ndarray, rows: list[int]) -> None:
        """See Matcher. By addresses: to make views of rows takes half as long as their masks."""
        assert words.dtype == np.int32 and words.flags.c_contiguous and max(rows) < len(words)
        start, size = words.ctypes.data, words.strides[0]
        for matcher, row in zip(matchers, rows, strict=True):
            matcher._matcher.unsafe_compute_mask_ptr(start + row * size, size)
            matcher._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().strip().splitlines()[0])

    def ended(self) -> bool:
        """See Matcher."""
        return self._matcher.is_stopped()

    def fork(self) -> "GuidanceMatcher":
        """See Matcher."""
        return GuidanceMatcher(self._matcher.deep_copy())
