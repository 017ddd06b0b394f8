# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The requests that are bound to a grammar, and the masks of their steps."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import numpy as np

from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, SchedulerOutput, TokenMask
from llmserve.core.structured_outputs import GRAMMAR_ERROR
from llmserve.errors import EngineError, GrammarError, LLMServeError
from llmserve.structured_output.base import CompiledGrammar, Matcher
from llmserve.structured_output.closing import Way
from llmserve.structured_output.compiler import GrammarCompiler, Key
from llmserve.structured_output.free_strings import FreeStrings
from llmserve.structured_output.schema import MAX_WHITESPACE
from llmserve.structured_output.thought import Thought
from llmserve.structured_output.whitespace import Whitespace
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)


@dataclass(slots=True)
class _Walk:
    """A request on its way through its grammar, its reasoning, or both."""

    matcher: Matcher | None
    params: SamplingParams
    thought: Thought | None
    whitespace: Whitespace | None = None
    strings: FreeStrings | None = None
    kept: np.ndarray | None = None  # the grammar's mask, within a string that may hold anything
    num_output: int = 0
    num_spaces: int = 0  # that the text ends with
    way: Way | None = None  # to the end of a text that would be cut off
    barred: np.ndarray | None = None  # words of tokens that the request itself forbids

    @property
    def is_narrowed(self) -> bool:
        """Whether more than its grammar may restrict the next token."""
        return (
            self.way is not None
            or self.num_output <= self.params.min_tokens  # at the first one, there is no way yet
            or self.barred is not None
            or self.num_spaces >= MAX_WHITESPACE
        )

    @property
    def forced(self) -> int | None:
        """The next token, where it is one of the end of its reasoning."""
        return None if self.thought is None else self.thought.forced


@dataclass(slots=True)
class GrammarRow:
    """Row `row` of a plan draws for `request`, which has a grammar or a budget."""

    row: int
    request: Request


class GrammarManager:
    """Knows each such request from its admission (`enter`) to its end (`leave`).

    A grammar that allows nothing, or is given a token that it does not allow, fails its request
    alone; a row is never left unbound.
    """

    def __init__(self, compiler: GrammarCompiler, logits_width: int, num_slots: int) -> None:
        self.compiler = compiler
        self._num_words = -(-logits_width // 32)
        self._walks: dict[int, _Walk] = {}  # by request key
        self._waiting: dict[Key, list[tuple[int, SamplingParams]]] = {}
        self._has_grammar = np.zeros(num_slots, np.bool_)
        self._words = np.empty((num_slots, self._num_words), np.int32)  # of a step's masks
        self._eos = [t for t in compiler.eos_token_ids if 0 <= t < logits_width]
        self._only_end = self._words_of(self._eos)
        self.num_masks = self.num_kept_masks = 0

    # -- requests come and go

    def enter(self, key: int, params: SamplingParams) -> bool:
        """Whether the request can run at once; else `take_ready` will name it."""
        if params.grammar is None:
            self._walks[key] = self._walk(None, params)
            return True
        grammar = self.compiler.get(params.grammar)
        if grammar is None:
            self._waiting.setdefault(params.grammar.key, []).append((key, params))
            return False
        self._walks[key] = self._walk(grammar.start(), params)
        return True

    def take_ready(self) -> list[tuple[int, LLMServeError | None]]:
        """Keys of requests whose grammar is there by now, or why it will never be."""
        ready: list[tuple[int, LLMServeError | None]] = []
        for name, result in self.compiler.take_done():
            for key, params in self._waiting.pop(name, ()):
                if isinstance(result, CompiledGrammar):
                    self._walks[key] = self._walk(result.start(), params)
                    ready.append((key, None))
                else:
                    ready.append((key, _coded(result)))
        return ready

    def leave(self, key: int) -> None:
        """The request has ended; unknown ones are ignored."""
        self._walks.pop(key, None)

    def keep_only(self, alive: Collection[int]) -> None:
        """Forgets requests that ended elsewhere, once they are many."""
        if len(self._walks) > 64 + 2 * len(alive):
            self._walks = {key: walk for key, walk in self._walks.items() if key in alive}

    # -- a step

    def rows_of(self, plan: SchedulerOutput, requests: list[Request | None]) -> list[GrammarRow]:
        """The plan's rows that may draw under a mask; `requests` by slot, as they are planned."""
        has = self._has_grammar
        for slot in plan.released:
            has[slot] = False
        for new in plan.new_requests:
            has[new.slot] = new.params.masked
        rows = np.flatnonzero(plan.sample & has[plan.slots])
        assert not plan.num_drafts[rows].any(), "drafts are not checked against a grammar"
        found = []
        for row in rows.tolist():
            request = requests[plan.slots[row]]
            assert request is not None
            found.append(GrammarRow(row, request))
        return found

    def binds(self, rows: list[GrammarRow], num_in_flight: int) -> bool:
        """Whether any row needs a mask. Of each, `num_in_flight` tokens may be drawn that were not
        given to `advance`."""
        walks = (self._walks.get(row.request.key) for row in rows)
        return any(
            walk is not None
            and (
                walk.matcher is not None
                or (walk.thought is not None and walk.thought.may_be_spent(num_in_flight))
            )
            for walk in walks
        )

    def mask(
        self, plan: SchedulerOutput, rows: list[GrammarRow]
    ) -> list[tuple[Request, LLMServeError]]:
        """Sets the plan's mask, in place of the one before. As `fill` otherwise."""
        words = self._words[: len(rows)]
        plan.mask = TokenMask(plan.slots[[row.row for row in rows]], words)
        return self.fill(dict(enumerate(rows)), words)

    def fill(
        self, rows: dict[int, GrammarRow], words: np.ndarray
    ) -> list[tuple[Request, LLMServeError]]:
        """Writes the mask of `rows[i]` into `words[i]`, int32 [n, ceil(logits_width / 32)];
        returns whose grammar has come to a dead end.

        All tokens drawn before must have been given to `advance`.
        """
        walks = {
            i: walk
            for i, row in rows.items()
            if row.request.finish_reason is None
            and (walk := self._walks.get(row.request.key)) is not None
        }
        filled = guarded(lambda: self._fill_together(walks, words), lambda error: set[int]())
        failed: list[tuple[Request, LLMServeError]] = []

        def fail(i: int, error: LLMServeError) -> None:
            words[i] = -1  # its draw is dropped
            failed.append((rows[i].request, error))

        for i, row in rows.items():
            walk = walks.get(i)
            if walk is None:
                words[i] = -1
            elif i not in filled or walk.is_narrowed:
                left = row.request.max_output_tokens - walk.num_output
                error = guarded(partial(self._fill, walk, words[i], left, i in filled), _broken)
                if error is not None:
                    fail(i, error)
        for i in np.flatnonzero(np.bitwise_or.reduce(words, axis=1) == 0).tolist():
            fault = "the grammar came to a state that no token leads out of"
            fail(i, _coded(GrammarError(fault)))
        self.num_masks += len(rows)
        return failed

    def _fill_together(self, walks: dict[int, _Walk], words: np.ndarray) -> set[int]:
        """The rows of `words` that now are as their grammar has them."""
        kinds: dict[type[Matcher], tuple[list[Matcher], list[int]]] = {}
        filled: set[int] = set()
        for i, walk in walks.items():
            if walk.matcher is None or walk.forced is not None:
                continue
            if walk.kept is not None:
                words[i] = walk.kept
                filled.add(i)
            elif not walk.matcher.ended():
                matchers, rows = kinds.setdefault(type(walk.matcher), ([], []))
                matchers.append(walk.matcher)
                rows.append(i)
        self.num_kept_masks += len(filled)
        for kind, (matchers, rows) in kinds.items():
            kind.fill_all(matchers, words, rows)
            filled.update(rows)
            for i in rows:
                strings = walks[i].strings
                if strings is not None and strings.holds(words[i]):
                    walks[i].kept = words[i].copy()
        return filled

    def _fill(
        self, walk: _Walk, words: np.ndarray, left: int, is_filled: bool
    ) -> LLMServeError | None:
        if not is_filled and not self._fill_alone(walk, words):
            return None
        assert walk.matcher is not None
        if walk.barred is not None and words.any():
            words &= ~walk.barred
            if not words.any():
                fault = "the grammar needs a token that allowed_token_ids or bad_words forbid"
                return _coded(GrammarError(fault))
        if walk.whitespace is not None and walk.num_spaces >= MAX_WHITESPACE:
            walk.whitespace.end(words)
        if walk.num_output < walk.params.min_tokens:
            early = words & ~self._words_of([*self._eos, *walk.params.stop_token_ids])
            if early.any():  # a text that is complete may end all the same
                words[:] = early
        elif (way := self._way(walk, left)) is not None:
            way.narrow(walk.matcher, words, left)
        return None

    def _fill_alone(self, walk: _Walk, words: np.ndarray) -> bool:
        """Whether it is the grammar that binds the row now."""
        if walk.forced is not None:
            words[:] = self._words_of([walk.forced])
        elif walk.matcher is None:
            words[:] = -1
        elif walk.matcher.ended():
            words[:] = self._only_end  # of a request that ignores it
        else:
            walk.matcher.fill(words)
            return True
        return False

    def _way(self, walk: _Walk, left: int) -> Way | None:
        """Of JSON alone: elsewhere nothing tells what leads to the end."""
        if walk.num_output == 0 and walk.barred is None and not walk.params.ignore_eos:
            grammar, tables = walk.params.grammar, self.compiler.tables
            assert grammar is not None and walk.matcher is not None
            if grammar.kind in ("json", "structural_tag"):
                assert tables is not None
                walk.way = Way(tables.closing, grammar.key, walk.matcher, left)
        return walk.way

    def advance(
        self, rows: list[GrammarRow], output: ModelRunnerOutput
    ) -> list[tuple[Request, LLMServeError]]:
        """Takes what the rows drew, before it is committed; returns whose token did not fit."""
        failed: list[tuple[Request, LLMServeError]] = []
        tokens, counts = output.token_ids.tolist(), output.num_tokens.tolist()
        for row in rows:
            walk = self._walks.get(row.request.key)
            if walk is None or row.request.finish_reason is not None:
                continue
            if output.invalid is not None and output.invalid[row.row]:
                continue  # fails at its commit
            for token in tokens[row.row][: counts[row.row]]:
                error = guarded(partial(self._accept, walk, token), _broken)
                if error is not None:
                    failed.append((row.request, error))
        return failed

    def _accept(self, walk: _Walk, token: int) -> LLMServeError | None:
        walk.num_output += 1
        if walk.thought is not None:
            walk.thought.feed(token)
        if walk.matcher is None:
            return None
        if walk.way is not None:
            walk.way.took(token)
        if walk.kept is not None and walk.strings is not None and not walk.strings.stays(token):
            walk.kept = None
        if walk.whitespace is not None:
            walk.num_spaces = walk.whitespace.after(walk.num_spaces, token)
        fits = token in self._eos if walk.matcher.ended() else walk.matcher.accept(token)
        return None if fits else EngineError(f"token {token} was drawn against the grammar")

    def _walk(self, matcher: Matcher | None, params: SamplingParams) -> _Walk:
        budget, barred = params.reasoning_budget, None
        if params.allowed_token_ids is not None:
            barred = ~self._words_of(params.allowed_token_ids)
        if alone := [word[0] for word in params.bad_words_token_ids if len(word) == 1]:
            bad = self._words_of(alone)
            barred = bad if barred is None else barred | bad
        thought = None if budget is None else Thought(budget)
        walk = _Walk(matcher, params, thought, barred=barred)
        grammar, tables = params.grammar, self.compiler.tables
        if grammar is not None and grammar.kind in ("json", "structural_tag"):
            assert tables is not None
            if grammar.free_strings:
                walk.strings = tables.strings
            if grammar.backend == "xgrammar" and not grammar.compact:
                walk.whitespace = tables.whitespace
        return walk

    def _words_of(self, tokens: list[int]) -> np.ndarray:
        words = np.zeros(self._num_words, np.uint32)
        for token in tokens:
            words[token // 32] |= np.uint32(1 << token % 32)
        return words.view(np.int32)


def _broken(error: Exception) -> LLMServeError:
    if isinstance(error, GrammarError):
        return _coded(error)
    logger.error("a grammar failed on its way", exc_info=error)
    return EngineError("The grammar of this request could not be followed.")


def _coded(error: LLMServeError) -> LLMServeError:
    is_ours = not isinstance(error, GrammarError)
    return error if is_ours else GrammarError(error.message, code=GRAMMAR_ERROR)
