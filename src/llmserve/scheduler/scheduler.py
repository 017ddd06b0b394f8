# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What runs in the next step, and what the results of a step mean."""

import heapq
import time
from collections import Counter, deque

import msgspec
import numpy as np

from llmserve.config.cache import CacheConfig
from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.kv_spec import KVCacheConfig, RecurrentStateSpec
from llmserve.core.messages import (
    EngineOutputs,
    EngineRequest,
    FinishReason,
    LogprobColumns,
    SchedulerStats,
)
from llmserve.core.request import Request
from llmserve.core.scheduler_output import ModelRunnerOutput, NewRequest, SchedulerOutput
from llmserve.errors import (
    DeadlineError,
    EngineError,
    LLMServeError,
    NumericalError,
    OverloadedError,
)
from llmserve.kv_cache.manager import NO_ROWS, KVCacheManager
from llmserve.kv_cache.prefix_hash import block_hash, extend_hashes
from llmserve.scheduler.admission import Admission
from llmserve.scheduler.cost import Room, StepCosts
from llmserve.scheduler.outbox import Outbox, cut
from llmserve.scheduler.policy import WaitingQueue, prompt_gates
from llmserve.scheduler.slots import Slots
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

_ONE = np.array(1, np.int64)  # numpy is slower with a Python integer
_MAX_PASSED = 64  # waiting requests that a step may pass over because another computes their block


class _InFlight(msgspec.Struct):
    plan: SchedulerOutput
    slots: np.ndarray  # int64 [num_rows]
    starts: np.ndarray  # int64 [num_rows]
    ends: np.ndarray  # int64 [num_rows]: computed tokens once the step is done
    sample: np.ndarray  # bool [num_rows]
    hashes: set[bytes]  # prefixes that the step computes
    num_decodes: int
    num_prompt_tokens: int
    weight: float  # of the prompts, where costs are kept
    departed: dict[int, Request] = {}  # by row: have left their slots

    def keep(self, rows: np.ndarray) -> None:
        """Drops the rows that are not in `rows`, int64, from the columns."""
        self.slots, self.starts, self.ends = self.slots[rows], self.starts[rows], self.ends[rows]
        self.sample = self.sample[rows]


class _Rows(msgspec.Struct):
    """Rows of the plan in the making that are not plain decodes."""

    slots: list[int] = []
    starts: list[int] = []
    counts: list[int] = []
    hashes: set[bytes] = set()
    preempted: set[int] = set()
    num_decodes: int = 0
    room: Room | None = None  # what prompts may have in all; None: not asked for yet
    num_tokens: int = 0  # of prompts
    weight: float = 0.0


class Scheduler:
    """Every request has tokens to do; a step has a budget of tokens and of rows.

    The state of running requests is in arrays by slot (`Slots`), so that a step costs Python time
    only for rows that start, fill a block or finish. `schedule` never needs the tokens of a step in
    flight; `commit` takes the steps' results in the order of their plans.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: CacheConfig,
        kv: KVCacheConfig,
        *,
        max_model_len: int,
        logits_width: int,
        eos_token_ids: list[int],
        seed: int,
        max_in_flight: int,
        num_draft_tokens: int = 0,
        costs: StepCosts | None = None,
    ) -> None:
        assert config.max_num_seqs is not None and config.max_num_batched_tokens is not None
        assert num_draft_tokens == 0 or max_in_flight == 1, "drafts need a synchronous engine"
        assert num_draft_tokens == 0 or not any(
            isinstance(group.spec, RecurrentStateSpec) for group in kv.groups
        ), "a recurrent state cannot take back rejected drafts"
        self.max_tokens = config.max_num_batched_tokens
        self.max_in_flight = max_in_flight
        self.kv = KVCacheManager(
            kv,
            num_slots=config.max_num_seqs + 1,
            max_model_len=max_model_len,
            max_chunk=self.max_tokens,
            enable_caching=cache.enable_prefix_caching,
        )
        self._block_size = np.array(self.kv.block_size)
        assert num_draft_tokens < self.kv.block_size
        self.slots = Slots(config.max_num_seqs, self.kv.block_size)
        self.waiting = WaitingQueue()
        self.held: dict[int, int] = {}  # prompt tokens of requests that wait for something outside
        self.requests: dict[int, Request] = {}
        self.counters = SchedulerStats()
        self._deadlines: list[tuple[float, int]] = []  # heap of (deadline, key); may be finished
        self._eos_token_ids = frozenset(eos_token_ids)
        self._num_drafts = num_draft_tokens
        self._no_drafts = np.zeros(config.max_num_seqs, np.int32)
        self._ones = np.ones(config.max_num_seqs, np.int64)
        self._gates = prompt_gates(config)
        self._costs = costs
        self._admission = Admission(
            config, self.kv, max_model_len, logits_width, self._eos_token_ids, seed
        )
        self._outbox = Outbox()
        self._in_flight: deque[_InFlight] = deque()
        self._released: list[int] = []
        self._new_blocks: list[np.ndarray] = []
        # how many reasons there are to look closer when a token is drawn, by token id
        self._num_stops = np.zeros(logits_width, np.int32)
        self._num_stops[[token for token in eos_token_ids if 0 <= token < logits_width]] = 1
        self._stops = self._num_stops > 0

    # -- requests come and go

    def add(self, message: EngineRequest, *, hold: bool = False) -> None:
        """Queues a request, or answers it at once with an error.

        With `hold` it has neither slot nor blocks until `release`.
        """
        if message.client << 32 | message.request_id in self.requests:
            self.counters.num_dropped_events += 1
            return
        request = guarded(
            lambda: self._admission.admit(
                message, len(self.waiting) + len(self.held), self._num_waiting_tokens()
            ),
            lambda error: self._refuse(message, error),
        )
        if request is None:
            return
        params = request.params
        if request.max_total_tokens == request.num_prompt_tokens and (
            params.prompt_logprobs is None or request.num_prompt_tokens == 1
        ):
            self._outbox.extra(request.client, request.wire_id).finish_reason = "length"
            return
        self.requests[request.key] = request
        if hold:
            self.held[request.key] = request.num_prompt_tokens
        else:
            self.waiting.push(request)
        if request.deadline:
            if len(self._deadlines) > 64 + 2 * len(self.requests):
                self._deadlines = [item for item in self._deadlines if item[1] in self.requests]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (request.deadline, request.key))

    def release(self, key: int) -> None:
        """A held request may run; nothing happens where it has ended meanwhile."""
        if key in self.held:
            del self.held[key]
            self.waiting.push(self.requests[key])

    def fail(self, key: int, error: LLMServeError) -> None:
        """Ends a request, wherever it is, with an error; nothing happens where it has ended."""
        request = self.requests.get(key)
        if request is not None:
            self._finish(request, "error", error=error)

    def _refuse(self, message: EngineRequest, error: Exception) -> None:
        if not isinstance(error, LLMServeError):
            logger.error("a request could not be taken", exc_info=error)
            error = EngineError("The engine could not take this request.")
        self._tell_error(message.client, message.request_id, error)

    def _expire(self) -> None:
        """Ends the requests whose time is over, wherever they are."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self.requests.get(heapq.heappop(self._deadlines)[1])
            if request is None:
                continue
            self.counters.num_expired += 1
            error: LLMServeError = DeadlineError("The request ran longer than its time.")
            if request.queue_time is None:
                error = OverloadedError("The request waited all of its time.", code="queue_timeout")
            self._finish(request, "error", error=error)

    def abort(self, client: int, wire_id: int) -> None:
        """Ends a request wherever it is; one that nobody knows is counted."""
        request = self.requests.get(client << 32 | wire_id)
        if request is None:
            self.counters.num_dropped_events += 1
            return
        self._finish(request, "abort")

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | None = None,
        error: LLMServeError | None = None,
    ) -> None:
        request.finish_reason = reason
        if request.slot:
            self._leave(request)
        elif request.key in self.held:
            del self.held[request.key]
        else:
            self.waiting.discard(request)
        del self.requests[request.key]
        if error is not None:
            self._tell_error(request.client, request.wire_id, error)
        extra = self._outbox.extra(request.client, request.wire_id)
        extra.finish_reason = reason
        extra.stop_reason = stop_reason
        extra.num_preemptions = request.num_preemptions
        self._tell_start(request)

    def _tell_error(self, client: int, wire_id: int, error: LLMServeError) -> None:
        extra = self._outbox.extra(client, wire_id)
        extra.finish_reason = "error"
        extra.error = error.code or error.type
        extra.message = error.message

    def _tell_start(self, request: Request) -> None:
        if not request.told_start and request.queue_time is not None:
            extra = self._outbox.extra(request.client, request.wire_id)
            extra.num_cached_tokens = request.num_cached_tokens
            extra.queue_time = request.queue_time
            request.told_start = True

    def _leave(self, request: Request) -> None:
        """Takes slot and blocks from a request; results in flight find it in `departed`."""
        slot = request.slot
        self.slots.leave(slot)
        request.slot = 0
        request.num_in_flight = 0
        # one that ends by what it has just drawn has drawn in all steps before: all it waits for
        # are the tokens that are not known yet
        if request.finish_reason not in ("stop", "length") or (
            self.slots.total.item(slot) > self.slots.known.item(slot)
        ):
            for flight in self._in_flight:
                for row in (flight.slots == np.array(slot)).nonzero()[0].tolist():
                    if row not in flight.departed:  # else it was of who had the slot before
                        flight.departed[row] = request
                        request.num_in_flight += 1
        self.kv.release(slot)
        self._admission.turns.left(request.tenant)
        self._released.append(slot)
        for token in request.params.stop_token_ids:
            self._num_stops[token] -= 1
            self._stops[token] = self._num_stops[token] > 0
        if self._new_blocks:
            self._new_blocks = [rows[rows[:, 0] != slot] for rows in self._new_blocks]

    def _preempt(self, slot: int, rows: _Rows) -> None:
        request = self.slots.requests[slot]
        assert request is not None
        self.slots.flush(slot, int(self.slots.known[slot]))
        self._leave(request)
        request.num_preemptions += 1
        self.counters.num_preemptions += 1
        self.waiting.push(request)
        rows.preempted.add(slot)

    # -- a step

    def schedule(self) -> SchedulerOutput | None:
        """The next plan; None where nothing can run before a step in flight is committed."""
        if len(self._in_flight) >= self.max_in_flight:
            return None
        if self._deadlines:
            self._expire()
        slots = self.slots
        running = slots.running
        computed = slots.computed[running]
        todo = np.minimum(slots.total[running], slots.last[running]) - computed
        single = todo == _ONE
        decodes, starts = running[single], computed[single]
        rows = _Rows()
        new_requests: list[NewRequest] = []
        counts = decodes[:0]
        if len(decodes):
            decodes, starts, counts = self._schedule_decodes(decodes, starts, rows)
            rows.num_decodes = len(decodes)
        budget = self.max_tokens - (int(counts.sum()) if self._num_drafts else len(counts))
        if len(decodes) < len(running):
            more = (todo > _ONE).nonzero()[0]
            if len(more):
                budget = self._schedule_prompts(running[more], todo[more].tolist(), budget, rows)
        if not rows.preempted and slots.free and len(self.waiting):
            self._schedule_waiting(budget, rows, new_requests)
        if rows.preempted:
            keep = ~np.isin(decodes, list(rows.preempted))
            decodes, starts, counts = decodes[keep], starts[keep], counts[keep]
        return self._plan(decodes, starts, counts, rows, new_requests)

    def _schedule_decodes(
        self, decodes: np.ndarray, starts: np.ndarray, rows: _Rows
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Slots, starts and token counts of the rows with one known token to do, drafts added."""
        slots = self.slots
        counts = self._ones[: len(decodes)]
        if self._num_drafts:
            room = slots.limit[decodes] - 1 - slots.total[decodes]
            counts = counts + np.where(
                slots.has_drafts[decodes], np.minimum(room, self._num_drafts), 0
            )
            most = int(np.searchsorted(counts.cumsum(), self.max_tokens, side="right"))
        else:
            most = self.max_tokens
        if most < len(decodes):
            decodes, starts, counts = decodes[:most], starts[:most], counts[:most]
        blocks, done = self.kv.extend_decodes(decodes, starts, starts + counts)
        self._new_blocks.append(blocks)
        if done < len(decodes):
            got = np.ones(len(decodes), np.bool_)
            for i in range(done, len(decodes)):
                slot, start = int(decodes[i]), int(starts[i])
                got[i] = self._make_room(slot, start, start + int(counts[i]), rows)
            decodes, starts, counts = decodes[got], starts[got], counts[got]
        return decodes, starts, counts

    def _make_room(self, slot: int, start: int, end: int, rows: _Rows) -> bool:
        """Blocks for one row, if need be from those after it in order, the last one first.

        So the first in order always gets on. One that gets nothing keeps what it has.
        """
        while self.slots.requests[slot] is not None:
            blocks, fits = self.kv.extend(slot, start, end)
            self._new_blocks.append(blocks)
            if fits:
                return True
            victim = int(self.slots.running[-1])
            if victim == slot:
                return False
            self._preempt(victim, rows)
        return False

    def _schedule_prompts(
        self, prompts: np.ndarray, todos: list[int], budget: int, rows: _Rows
    ) -> int:
        """Running requests with more than one known token to do; returns the budget left."""
        for slot, todo in zip(prompts.tolist(), todos, strict=True):
            request = self.slots.requests[slot]
            if request is None:  # preempted just now
                continue
            start = int(self.slots.computed[slot])
            count = self._trim(start, todo, budget, rows)
            if count and self._make_room(slot, start, start + count, rows):
                self._add_row(rows, request, start, count)
                budget -= count
        return budget

    def _trim(self, start: int, todo: int, budget: int, rows: _Rows) -> int:
        for gate in self._gates:
            todo = gate(todo, budget)
        costs = self._costs
        if costs is None or not rows.num_decodes or (todo <= costs.least and not rows.slots):
            return todo
        if rows.room is None:
            rows.room = costs.room(rows.num_decodes, start)
        fits = self._fit(rows.room, rows, start)
        if todo <= fits:
            return todo
        if fits >= min(costs.least, rows.room.tokens):
            return fits
        return 0 if rows.slots else min(todo, costs.least)

    def _fit(self, room: Room, rows: _Rows, start: int) -> int:
        """How many tokens from position `start` on have room beside those in `rows`."""
        assert self._costs is not None
        left = self._costs.fit(start, max(room.weight - rows.weight, 0.0))
        return min(left, room.tokens - rows.num_tokens)

    def _is_full(self, rows: _Rows, num_tokens: int) -> bool:
        """Whether no part of another prompt of `num_tokens` has room beside those in `rows`."""
        if self._costs is None or rows.room is None:
            return False
        return self._fit(rows.room, rows, 0) < min(self._costs.least, num_tokens)

    def _add_row(self, rows: _Rows, request: Request, start: int, count: int) -> None:
        rows.slots.append(request.slot)
        rows.starts.append(start)
        rows.counts.append(count)
        rows.num_tokens += count
        if self._costs is not None:
            rows.weight += self._costs.weight(start, count)
        rows.hashes.update(self.kv.hashes_touched(request, start, start + count))

    def _schedule_waiting(self, budget: int, rows: _Rows, new_requests: list[NewRequest]) -> None:
        """Lets waiting requests start, in order, while there are tokens, slots and blocks."""
        computing = [flight.hashes for flight in self._in_flight] + [rows.hashes]
        passed: list[Request] = []
        while budget and self.slots.free and len(passed) < _MAX_PASSED:
            request = self.waiting.first()
            if (
                request is not None
                and len(self.slots.free) == 1
                and self._admission.turns.leaves_last(request.tenant, self.slots.num_running)
            ):
                request = self.waiting.first(but=request.tenant)
            if request is None or request.num_in_flight:
                break
            if request.waits_for and any([request.waits_for in names for names in computing]):
                passed.append(self.waiting.pop(request))
                continue
            idle = not self.slots.num_running
            if request.num_blocks_wanted > self.kv.pool.num_available and not idle:
                break
            if rows.slots and self._is_full(rows, request.num_tokens):
                break
            hit = self.kv.lookup(request)
            request.waits_for = self.kv.next_hash(request, hit)
            if request.waits_for and any([request.waits_for in names for names in computing]):
                passed.append(self.waiting.pop(request))
                continue
            todo = min(request.num_tokens, request.max_total_tokens - 1) - hit.num_tokens
            count = self._trim(hit.num_tokens, todo, budget, rows)
            if not count:
                break
            end = hit.num_tokens + count
            slot = self.slots.free[-1]
            if not self.kv.enter(slot, request, hit, end, self.slots.num_running):
                break
            self.waiting.pop(request)
            self._start(request, hit.num_tokens)
            assert request.slot == slot
            self.counters.num_chunked_prefills += count < todo and request.num_preemptions == 0
            self._add_row(rows, request, hit.num_tokens, count)
            budget -= count
            new_requests.append(
                NewRequest(
                    slot,
                    request.token_ids,
                    request.num_prompt_tokens,
                    request.seed,
                    request.params,
                    self.kv.table_of(slot),
                )
            )
        self.waiting.push_all(passed)

    def _start(self, request: Request, num_cached: int) -> None:
        if request.queue_time is None:
            request.queue_time = max(time.monotonic() - request.arrival, 0.0)
            request.num_cached_tokens = num_cached
            if self.kv.enable_caching and not request.wants_prompt_logprobs:
                self.counters.prefix_queries += request.num_tokens
                self.counters.prefix_hits += num_cached
        request.slot = self.slots.enter(request, num_cached)
        self._admission.turns.entered(request.tenant, request.order[1])
        for token in request.params.stop_token_ids:
            self._num_stops[token] += 1
            self._stops[token] = True

    def _plan(
        self,
        decodes: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        rows: _Rows,
        new_requests: list[NewRequest],
    ) -> SchedulerOutput | None:
        slots, n = self.slots, len(decodes)
        if rows.preempted:
            keep = [i for i, slot in enumerate(rows.slots) if slot not in rows.preempted]
            rows.slots = [rows.slots[i] for i in keep]
            rows.starts = [rows.starts[i] for i in keep]
            rows.counts = [rows.counts[i] for i in keep]
            rows.num_tokens = sum(rows.counts)
        num_rows = n + len(rows.slots)
        if not num_rows:
            return None
        if n:
            columns = np.empty((3, num_rows), np.int64)
            columns[0, :n], columns[1, :n], columns[2, :n] = decodes, starts, counts
            if rows.slots:
                columns[:, n:] = rows.slots, rows.starts, rows.counts
        else:
            columns = np.array((rows.slots, rows.starts, rows.counts))
        drafts = self._no_drafts[:num_rows]
        if self._num_drafts:
            drafts = columns[2].astype(np.int32) - 1
            drafts[n:] = 0
        if self._num_drafts or 1 in rows.counts:
            order = np.argsort(columns[2] > _ONE, kind="stable")
            columns, drafts = columns[:, order], drafts[order]
        decodes, starts, counts = columns[0], columns[1], columns[2]
        narrow = columns.astype(np.int32)
        ends = starts + counts
        total = slots.total[decodes]
        sample = ends >= total
        slots.computed[decodes] = ends
        slots.total[decodes] = total + sample
        scores = None
        if slots.num_scoring:
            scores = slots.scores[decodes] & (starts + 1 < slots.num_prompt[decodes])
        blocks = self._new_blocks or [NO_ROWS]
        self.counters.num_steps += 1
        plan = SchedulerOutput(
            step=self.counters.num_steps,
            slots=narrow[0],
            num_computed=narrow[1],
            num_scheduled=narrow[2],
            num_drafts=drafts,
            sample=sample,
            new_blocks=np.concatenate(blocks) if len(blocks) > 1 else blocks[0],
            new_requests=new_requests,
            released=self._released,
            prompt_logprobs=scores if scores is not None and scores.any() else None,
        )
        self._new_blocks, self._released = [], []
        self._in_flight.append(
            _InFlight(
                plan, decodes, starts, ends, sample, rows.hashes, n, rows.num_tokens, rows.weight
            )
        )  # fmt: skip
        self.counters.num_tokens_computed += (
            int(counts.sum()) if self._num_drafts else n + rows.num_tokens
        )
        if len(self._in_flight) > self.counters.max_in_flight:
            self.counters.max_in_flight = len(self._in_flight)
        return plan

    # -- results

    def commit(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Takes what the oldest step in flight drew."""
        flight = self._in_flight.popleft()
        assert flight.plan.step == plan.step, "steps are committed in the order of their plans"
        if self._costs is not None and output.seconds:
            self._costs.observe(
                flight.num_decodes, flight.num_prompt_tokens, flight.weight, output.seconds
            )
        live: np.ndarray | None = None  # None: every row
        token_ids, num_tokens = output.token_ids, output.num_tokens
        if flight.departed:
            live = np.ones(len(flight.slots), np.bool_)
            live[list(flight.departed)] = False
            for i, request in flight.departed.items():
                self._commit_departed(request, plan, output, i)
        if output.invalid is not None and np.count_nonzero(output.invalid):
            failed = output.invalid.astype(np.bool_)
            if live is None:
                live = np.ones(len(failed), np.bool_)
            for i in (failed & live).nonzero()[0].tolist():
                self._fail(self._request_in(int(flight.slots[i])), int(output.invalid[i]))
            live &= ~failed
        if live is not None:
            rows = live.nonzero()[0]
            flight.keep(rows)
            token_ids, num_tokens = token_ids[rows], num_tokens[rows]
        finished = self._commit_tokens(flight, token_ids, num_tokens)
        if output.logprobs or output.prompt_logprobs:
            self._commit_logprobs(plan, output, live)
        self._commit_blocks(flight)
        for request, reason, stop_reason in finished:
            self._finish(request, reason, stop_reason)

    def _request_in(self, slot: int) -> Request:
        request = self.slots.requests[slot]
        assert request is not None
        return request

    def _commit_tokens(
        self, flight: _InFlight, token_ids: np.ndarray, num_tokens: np.ndarray
    ) -> list[tuple[Request, FinishReason, int | None]]:
        """Appends what the flight's rows drew; returns who is done. Sets `ends` back for drafts."""
        slots, ends, row_slots = self.slots, flight.ends, flight.slots
        finished: list[tuple[Request, FinishReason, int | None]] = []
        if np.count_nonzero(flight.sample) < len(row_slots):
            scored, rows = (~flight.sample).nonzero()[0], flight.sample.nonzero()[0]
            for i in scored[ends[scored] >= slots.limit[row_slots[scored]] - _ONE].tolist():
                finished.append((self._request_in(int(row_slots[i])), "length", None))
            row_slots, token_ids, num_tokens = row_slots[rows], token_ids[rows], num_tokens[rows]
        drawn_slots = row_slots
        for column in range(token_ids.shape[1]):
            if column:
                more = (num_tokens > column).nonzero()[0]
                drawn_slots, token_ids = drawn_slots[more], token_ids[more]
                num_tokens = num_tokens[more]
            if not len(drawn_slots):
                break
            tokens = token_ids[:, column]
            known = slots.append(drawn_slots, tokens)
            self._outbox.tokens(slots.client[drawn_slots], slots.wire_id[drawn_slots], tokens)
            closer = (known >= slots.limit[drawn_slots]) | self._stops[tokens.astype(np.int64)]
            stopped: list[int] = []
            for i in closer.nonzero()[0].tolist():
                request = self._request_in(drawn_slots.item(i))
                end = self._end_of(request, tokens.item(i), known.item(i))
                if end is not None:
                    stopped.append(i)
                    finished.append((request, *end))
            if stopped and self._num_drafts:
                num_tokens = num_tokens.copy()
                num_tokens[stopped] = 0
        if self._num_drafts:
            known = slots.known[row_slots]
            ends[flight.sample] = known - _ONE
            slots.computed[row_slots] = known - _ONE
            slots.total[row_slots] = known
            slots.has_drafts[row_slots] = True
        for slot in row_slots[slots.untold[row_slots]].tolist():
            self._tell_start(self._request_in(slot))
            slots.untold[slot] = False
        return finished

    def _end_of(
        self, request: Request, token: int, num_tokens: int
    ) -> tuple[FinishReason, int | None] | None:
        """Whether a request ends with the token that it just got."""
        params = request.params
        num_output = num_tokens - request.num_prompt_tokens
        if token in request.stop_token_ids and num_output >= params.min_tokens:
            is_eos = token in self._eos_token_ids and not params.ignore_eos
            return "stop", None if is_eos else token
        return ("length", None) if num_tokens >= request.max_total_tokens else None

    def _commit_logprobs(
        self, plan: SchedulerOutput, output: ModelRunnerOutput, live: np.ndarray | None
    ) -> None:
        news: list[tuple[int, int, LogprobColumns]] = []
        for i, columns in output.logprobs.items():
            if live is None or live[i]:
                slot = plan.slots.item(i)
                request = self._request_in(slot)
                if self._num_drafts:  # a stop may have cut the row
                    first = plan.num_computed[i] + plan.num_scheduled[i] - plan.num_drafts[i]
                    columns = cut(columns, 0, int(self.slots.known[slot] - first))
                news.append((request.client, request.wire_id, columns))
        self._outbox.logprobs(news)
        for i in output.prompt_logprobs:
            if live is None or live[i]:
                slot = int(plan.slots[i])
                request = self._request_in(slot)
                self._take_prompt_logprobs(request, plan, i, output)
                if not request.wants_prompt_logprobs:
                    self.slots.scored(slot)

    def _take_prompt_logprobs(
        self, request: Request, plan: SchedulerOutput, i: int, output: ModelRunnerOutput
    ) -> None:
        """Reports what has not been reported before a preemption."""
        columns = output.prompt_logprobs[i]
        start = int(plan.num_computed[i])
        done = request.prompt_logprobs_done
        assert start <= done
        if start + columns.n > done:
            new = cut(columns, done - start, columns.n)
            self._outbox.prompt_logprobs(request.client, request.wire_id, new)
            request.prompt_logprobs_done = start + columns.n

    def _commit_blocks(self, flight: _InFlight) -> None:
        """Rows that filled a block: their tokens are kept, the block becomes findable."""
        size = self.kv.block_size
        starts, ends = flight.starts, flight.ends
        filled = (ends % self._block_size < ends - starts).nonzero()[0]
        if not len(filled):
            return
        owners: list[int] = []
        hashes: list[bytes] = []
        granules: list[int] = []
        passed: list[tuple[int, int]] = []
        requests, recent, width = self.slots.requests, self.slots.recent, 4 * size
        for slot, start, end in zip(
            flight.slots[filled].tolist(),
            starts[filled].tolist(),
            ends[filled].tolist(),
            strict=True,
        ):
            request = requests[slot]
            assert request is not None
            known, before, last = request.block_hashes, end - size, end // size
            if before and len(known) * size == before == len(request.tokens) >> 2:  # decoded
                at = (slot + slot + (last - 1 & 1)) * width
                block = recent[at : at + width]
                request.tokens += block
                name = block_hash(known[-1], block)
                known.append(name)
                hashes.append(name)
                owners.append(slot)
                granules.append(last)
                continue
            first = start // size
            self.slots.flush(slot, last * size)
            owners += [slot] * (last - first)
            hashes += extend_hashes(request, last, size)[first:last]
            granules += range(first + 1, last + 1)
            if end >= self.kv.first_past:
                passed.append((slot, end))
        if self.kv.enable_caching:
            self.kv.commit(owners, hashes, granules)
        for slot, end in passed:
            self._new_blocks.append(self.kv.trim(slot, end))

    def _fail(self, request: Request, invalid: int) -> None:
        if request.slot:
            self.kv.forget(request.slot)
        error: LLMServeError = NumericalError("the model's logits for this request were not finite")
        if invalid > 1:
            error = EngineError("This request's sampling failed.")
        else:
            self.counters.num_corrupted += 1
        self._finish(request, "error", error=error)

    def _commit_departed(
        self, request: Request, plan: SchedulerOutput, output: ModelRunnerOutput, i: int
    ) -> None:
        """The result of a row whose request has left its slot: kept if it was preempted."""
        request.num_in_flight -= 1
        if request.finish_reason in ("stop", "length"):
            self.counters.num_wasted_tokens += int(output.num_tokens[i])
            return
        self.counters.num_late_results += 1
        if request.finish_reason is not None:
            return
        if output.invalid is not None and output.invalid[i]:
            self._fail(request, int(output.invalid[i]))
            return
        if i in output.prompt_logprobs:
            self._take_prompt_logprobs(request, plan, i, output)
        end: tuple[FinishReason, int | None] | None = None
        count = int(output.num_tokens[i])
        if count:  # with results in flight after it is preempted there are no drafts
            assert count == 1
            token = int(output.token_ids[i, 0])
            request.tokens += token.to_bytes(4, "little")
            end = self._end_of(request, token, request.num_tokens)
            self._outbox.tokens(
                np.array([request.client]),
                np.array([request.wire_id], np.uint32),
                output.token_ids[i, :1].copy(),
            )
            if i in output.logprobs:
                news = request.client, request.wire_id, output.logprobs[i]
                self._outbox.logprobs([news])
            self._tell_start(request)
        elif request.max_total_tokens == request.num_prompt_tokens and (
            not request.wants_prompt_logprobs
        ):
            end = "length", None
        if end is not None:
            self._finish(request, *end)

    # -- the rest

    def take_outputs(self) -> dict[int, EngineOutputs]:
        """News by client since the last call."""
        return self._outbox.take()

    def has_unfinished(self) -> bool:
        """Whether a step in flight or a request that is not held remains."""
        return len(self.requests) > len(self.held) or bool(self._in_flight)

    def stats(self) -> SchedulerStats:
        """Gauges as they stand and counters since the start."""
        pool = self.kv.pool
        return msgspec.structs.replace(
            self.counters,
            num_running=self.slots.num_running,
            num_waiting=len(self.waiting) + len(self.held),
            num_held=len(self.held),
            num_waiting_tokens=self._num_waiting_tokens(),
            num_blocks_total=pool.num_blocks - 1,
            num_blocks_free=pool.num_empty,
            num_blocks_cached=pool.num_cached_free,
        )

    def _num_waiting_tokens(self) -> int:
        return self.waiting.num_prompt_tokens + sum(self.held.values())

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False, and nothing done, while anything runs."""
        if self.slots.num_running or self._in_flight:
            return False
        self.kv.reset_prefix_cache()
        return True

    def check_integrity(self) -> None:
        """Recounts everything that is counted; an assertion names what is wrong."""
        slots, stops = self.slots, np.zeros_like(self._num_stops)
        slots.check_integrity()
        self.kv.check_integrity(slots.running.tolist())
        stops[[token for token in self._eos_token_ids if token < len(stops)]] = 1
        departed: Counter[Request] = Counter()
        for flight in self._in_flight:
            departed.update(flight.departed.values())
            there = [i for i in range(len(flight.slots)) if i not in flight.departed]
            assert all(slots.requests[slot] for slot in flight.slots[there].tolist())
        assert all(not r.slot and r.num_in_flight == n for r, n in departed.items())
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        assert sum(r.num_prompt_tokens for r in waiting) == self.waiting.num_prompt_tokens
        running = [self._request_in(slot) for slot in slots.running.tolist()]
        for request in running:
            assert slots.requests[request.slot] is request and request.finish_reason is None
            for token in request.params.stop_token_ids:
                stops[token] += 1
        assert np.array_equal(stops, self._num_stops) and np.array_equal(stops > 0, self._stops)
        assert {r.key for r in waiting + running} | self.held.keys() == self.requests.keys()
        assert not any(r.slot for r in waiting + [self.requests[key] for key in self.held])
        assert len(waiting) + len(running) + len(self.held) == len(self.requests)
        if not self._in_flight:
            assert self.requests or self.kv.pool.num_available == self.kv.pool.num_blocks - 1
