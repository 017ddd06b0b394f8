# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The masks of a step, with grammars that do what the test says."""

from typing import Any

import numpy as np
import pytest

from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler_output import ModelRunnerOutput, NewRequest, SchedulerOutput
from llmserve.core.structured_outputs import GRAMMAR_ERROR, GrammarSpec
from llmserve.errors import EngineError, GrammarError, LLMServeError
from llmserve.structured_output.base import CompiledGrammar, Matcher
from llmserve.structured_output.manager import GrammarManager, GrammarRow

EOS, WIDTH = 2, 40
NO_BLOCKS = np.empty((0, 4), np.int32)


class Script(Matcher):
    """Allows `steps[i]` for token i; its text may end where EOS is among them."""

    def __init__(self, steps: list[list[int]]) -> None:
        self.steps = steps
        self.taken: list[int] = []
        self.is_ended = False

    def accept(self, token: int) -> bool:
        if token not in self.steps[len(self.taken)]:
            return False
        self.taken.append(token)
        self.is_ended = token == EOS
        return True

    def fill(self, words: np.ndarray) -> None:
        if len(self.taken) >= len(self.steps):
            raise RuntimeError("the library has a bug")
        bits = np.zeros(64, np.uint8)
        bits[self.steps[len(self.taken)]] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def ended(self) -> bool:
        return self.is_ended

    def fork(self) -> "Script":
        raise NotImplementedError


class Grammar(CompiledGrammar):
    def __init__(self, steps: list[list[int]]) -> None:
        self.steps = steps

    def start(self) -> Script:
        return Script(self.steps)


class Compiler:
    """Has what the test puts into it."""

    eos_token_ids = (EOS,)
    tables = None

    def __init__(self) -> None:
        self.there: dict[Any, CompiledGrammar] = {}
        self.done: list[tuple[Any, CompiledGrammar | LLMServeError]] = []

    def get(self, spec: GrammarSpec) -> CompiledGrammar | None:
        return self.there.get(spec.key)

    def take_done(self) -> list[tuple[Any, CompiledGrammar | LLMServeError]]:
        done, self.done = self.done, []
        return done


def _params(text: str = "g", **fields: Any) -> SamplingParams:
    grammar = GrammarSpec(backend="xgrammar", kind="regex", text=text)
    return SamplingParams(grammar=grammar, **fields)


class Bench:
    """One request in slot 1, step by step."""

    def __init__(self, steps: list[list[int]], **fields: Any) -> None:
        self.compiler: Any = Compiler()
        self.manager = GrammarManager(self.compiler, WIDTH, num_slots=4)
        params = _params(**fields)
        assert params.grammar is not None
        self.compiler.there[params.grammar.key] = Grammar(steps)
        message = EngineRequest(client=0, request_id=9, prompt=b"\0" * 4, params=params, arrival=0)
        self.request = Request(message, 100, frozenset([EOS]))
        assert self.manager.enter(self.request.key, params)
        self.new = [NewRequest(1, np.zeros(1, np.int32), 1, 0, params, [])]

    def rows(self, sample: bool = True) -> tuple[SchedulerOutput, list[GrammarRow]]:
        one = np.ones(1, np.int32)
        plan = SchedulerOutput(
            1, one, 0 * one, one, 0 * one, np.array([sample]), NO_BLOCKS, new_requests=self.new
        )
        self.new = []
        return plan, self.manager.rows_of(plan, [None, self.request, None, None])

    def allowed(self) -> list[int] | LLMServeError:
        plan, rows = self.rows()
        assert [row.row for row in rows] == [0]
        failed = self.manager.mask(plan, rows)
        assert plan.mask is not None and plan.mask.slots.tolist() == [1]
        if failed:
            assert failed[0][0] is self.request
            return failed[0][1]
        bits = np.unpackbits(plan.mask.words.view(np.uint8), bitorder="little")[:WIDTH]
        return np.flatnonzero(bits).tolist()

    def draw(self, token: int, **fields: Any) -> list[LLMServeError]:
        output = ModelRunnerOutput(np.array([[token]], np.int32), np.ones(1, np.int32), **fields)
        return [e for _, e in self.manager.advance([GrammarRow(0, self.request)], output)]


def test_masks_follow_the_tokens() -> None:
    bench = Bench([[3, 33], [EOS, 5], [7]])
    assert bench.allowed() == [3, 33]
    assert bench.draw(33) == []
    assert bench.allowed() == [EOS, 5]
    assert bench.draw(5) == []
    assert bench.allowed() == [7]
    assert bench.manager.num_masks == 3


def test_a_prompt_that_is_not_done_needs_no_mask() -> None:
    bench = Bench([[3]])
    assert bench.rows(sample=False)[1] == []
    assert bench.allowed() == [3]


def test_min_tokens_forbids_ends_while_there_is_something_else() -> None:
    bench = Bench([[EOS, 3, 4], [EOS, 3], [EOS]], min_tokens=9, stop_token_ids=[4])
    assert bench.allowed() == [3]
    bench.draw(3)
    assert bench.allowed() == [3]
    bench.draw(3)
    assert bench.allowed() == [EOS], "a complete text may end"


def test_min_tokens_counts() -> None:
    bench = Bench([[EOS, 3], [EOS, 3]], min_tokens=1)
    bench.allowed()
    bench.draw(3)
    assert bench.allowed() == [EOS, 3]


def test_after_the_end_come_only_ends() -> None:
    bench = Bench([[EOS]], ignore_eos=True)
    bench.draw(EOS)
    assert bench.allowed() == [EOS]
    assert bench.draw(EOS) == []
    assert isinstance(bench.draw(3)[0], EngineError)


def test_tokens_that_the_request_forbids_are_none_of_the_grammar() -> None:
    bench = Bench([[3, 33], [5, 34], [7]], allowed_token_ids=[3, 34, 5], bad_words_token_ids=[[5]])
    assert bench.allowed() == [3]
    assert bench.draw(3) == []
    assert bench.allowed() == [34]
    assert bench.draw(34) == []
    error = bench.allowed()
    assert isinstance(error, GrammarError) and "allowed_token_ids" in error.message
    bench = Bench([[3, 33]], bad_words_token_ids=[[33], [3, 5]])
    assert bench.allowed() == [3]


def test_a_dead_end_is_the_grammars_fault() -> None:
    error = Bench([[]]).allowed()
    assert isinstance(error, GrammarError) and error.code == GRAMMAR_ERROR


def test_a_token_against_the_grammar_and_a_broken_library_are_ours() -> None:
    assert isinstance(Bench([[3]]).draw(4)[0], EngineError)
    bench = Bench([[3]])
    bench.draw(3)
    error = bench.allowed()
    assert isinstance(error, EngineError) and "bug" not in error.message  # it may say anything


def test_who_has_ended_gets_a_mask_and_no_token() -> None:
    bench = Bench([[3], [4]])
    plan, rows = bench.rows()
    bench.request.finish_reason = "stop"
    assert bench.manager.mask(plan, rows) == []
    assert plan.mask is not None and (plan.mask.words == -1).all()
    assert bench.draw(9) == []
    bench.manager.leave(bench.request.key)
    bench.manager.leave(bench.request.key)


def test_what_a_failed_row_drew_is_not_looked_at() -> None:
    bench = Bench([[3], [4]])
    assert bench.draw(0, invalid=np.ones(1, np.bool_)) == []
    assert bench.allowed() == [3]


def test_a_slot_that_was_given_up_is_free_of_the_grammar() -> None:
    bench = Bench([[3]])
    bench.rows()
    one = np.ones(1, np.int32)
    plan = SchedulerOutput(
        2, one, 0 * one, one, 0 * one, np.array([True]), NO_BLOCKS,
        new_requests=[NewRequest(1, np.zeros(1, np.int32), 1, 0, SamplingParams(), [])],
        released=[1],
    )  # fmt: skip
    assert bench.manager.rows_of(plan, [None, bench.request]) == []


def test_drafts_are_not_allowed() -> None:
    bench = Bench([[3]])
    bench.rows()
    one = np.ones(1, np.int32)
    plan = SchedulerOutput(2, one, one, one + 1, one, np.array([True]), NO_BLOCKS)
    with pytest.raises(AssertionError, match="drafts"):
        bench.manager.rows_of(plan, [None, bench.request])


def test_all_who_wait_for_a_grammar_hear_of_it() -> None:
    compiler: Any = Compiler()
    manager = GrammarManager(compiler, WIDTH, 4)
    good, bad = _params("good"), _params("bad")
    for key, params in ((1, good), (2, good), (3, bad)):
        assert not manager.enter(key, params)
    assert good.grammar is not None and bad.grammar is not None
    compiler.done = [
        (good.grammar.key, Grammar([[3]])), (bad.grammar.key, GrammarError("no")),
    ]  # fmt: skip
    ready = manager.take_ready()
    assert [(key, error is None) for key, error in ready] == [(1, True), (2, True), (3, False)]
    assert ready[2][1] is not None and ready[2][1].code == GRAMMAR_ERROR
    assert manager.take_ready() == []


def test_requests_that_ended_elsewhere_are_forgotten() -> None:
    bench = Bench([[3]])
    alive = [bench.request.key, 1000]
    for key in range(1000, 1100):
        assert bench.manager.enter(key, _params())
    bench.manager.keep_only(alive)
    assert sorted(bench.manager._walks) == sorted(alive)
    assert bench.allowed() == [3]


@pytest.mark.parametrize("broken", [False, True])
def test_a_library_that_fails_for_one_fails_for_no_other(broken: bool) -> None:
    """Masks of all rows are asked for together; then each by itself."""
    compiler: Any = Compiler()
    manager = GrammarManager(compiler, WIDTH, 4)
    requests: list[Request | None] = [None]
    new = []
    for slot, steps in enumerate(([[3]], [] if broken else [[5]], [[4]]), 1):
        params = _params(str(slot))
        assert params.grammar is not None
        compiler.there[params.grammar.key] = Grammar(steps)
        message = EngineRequest(client=0, request_id=slot, prompt=b"", params=params, arrival=0)
        request = Request(message, 100, frozenset([EOS]))
        requests.append(request)
        assert manager.enter(request.key, params)
        new.append(NewRequest(slot, np.zeros(1, np.int32), 1, 0, params, []))
    one = np.ones(3, np.int32)
    plan = SchedulerOutput(
        1, np.array([3, 2, 1], np.int32), 0 * one, one, 0 * one, one.astype(bool), NO_BLOCKS,
        new_requests=new,
    )  # fmt: skip
    failed = manager.mask(plan, manager.rows_of(plan, requests))
    assert [request for request, _ in failed] == ([requests[2]] if broken else [])
    assert plan.mask is not None and plan.mask.slots.tolist() == [3, 2, 1]
    assert plan.mask.words[:, 0].tolist() == [1 << 4, -1 if broken else 1 << 5, 1 << 3]
