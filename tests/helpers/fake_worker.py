# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A worker whose "KV cache" is checkable: every token depends on every cell that it should read.

A cell holds a hash of its token and of the cell before it, read back through the block table. A
drawn token is a hash over the cells of the context, per group: all of them, those in the window, or
the state. A wrong block, a lost update, an early free or a wrong hit changes the tokens.
"""

import random

import numpy as np

from llmserve.core.kv_spec import (
    AnyKVSpec,
    FullAttentionSpec,
    KVCacheConfig,
    RecurrentStateSpec,
    SlidingWindowSpec,
)
from llmserve.core.messages import LogprobColumns
from llmserve.core.scheduler_output import ModelRunnerOutput, NewRequest, SchedulerOutput

VOCABULARY = 97
EOS = 0
_MASK = 2**64 - 1
_WEIGHTS = np.random.default_rng(7).integers(1, 2**63, 4096, dtype=np.uint64) | np.uint64(1)
FULL = FullAttentionSpec(1, 8, 2)
STATE_BYTES = FULL.page_bytes(4)


def window(size: int) -> SlidingWindowSpec:
    """A sliding window of the same page size as FULL."""
    return SlidingWindowSpec(1, 8, 2, window=size)


def chain(state: int, token: int) -> int:
    """What a cell holds, from the cell before it."""
    return (state * 6364136223846793005 + token + 1442695040888963407) & _MASK


def _digest(values: np.ndarray, stop: int) -> int:
    """Of the cells of the positions before `stop`, uint64 [n]."""
    return int((values * _WEIGHTS[stop - len(values) : stop]).sum())


def _draw(digests: list[int], seed: int) -> int:
    mixed = seed
    for digest in digests:
        mixed = chain(mixed ^ (digest >> 7), digest & _MASK)
    return (mixed >> 33) % VOCABULARY


class Solo:
    """The same model without blocks, batches or scheduler."""

    def __init__(self, specs: list[AnyKVSpec], content: int, seed: int) -> None:
        self.specs = specs
        self.seed = seed
        self.values = np.zeros((len(specs), 4096), np.uint64)
        self.state = [content + g for g in range(len(specs))]
        self.num_tokens = 0

    def feed(self, tokens: list[int]) -> None:
        """Computes more positions."""
        for token in tokens:
            for g in range(len(self.specs)):
                self.state[g] = chain(self.state[g], token)
                self.values[g, self.num_tokens] = self.state[g]
            self.num_tokens += 1

    def draw(self) -> int:
        """The token after those fed."""
        digests = []
        for g, spec in enumerate(self.specs):
            n, start = self.num_tokens, 0
            if isinstance(spec, SlidingWindowSpec):
                start = max(n - spec.window, 0)
            elif isinstance(spec, RecurrentStateSpec):
                start = n - 1
            digests.append(_digest(self.values[g, start:n], n))
        return _draw(digests, self.seed)


class _Slot:
    def __init__(self, new: NewRequest, width: int) -> None:
        self.tokens: list[int] = new.token_ids.tolist()
        self.num_prompt = new.num_prompt_tokens
        self.params = new.params
        self.seed = new.seed
        self.content = int(new.params.extra_args.get("content", 0))
        self.tables = [np.zeros(width, np.int32) for _ in new.blocks]
        for table, blocks in zip(self.tables, new.blocks, strict=True):
            table[: len(blocks)] = blocks
        self.drafts: list[int] = []


class FakeWorker:
    """Executes plans in order. `nan_rate` of the rows come back invalid, their cells spoiled."""

    def __init__(
        self,
        kv: KVCacheConfig,
        max_model_len: int,
        rng: random.Random,
        num_drafts: int = 0,
        nan_rate: float = 0.0,
    ) -> None:
        self.kv = kv
        self.specs = [group.spec for group in kv.groups]
        self.sizes = [group.block_size for group in kv.groups]
        self.rng = rng
        self.nan_rate = nan_rate
        self.num_drafts = num_drafts
        self.num_nan = self.num_accepted = self.num_tokens = 0
        self.width = -(-max_model_len // min(self.sizes)) + 1
        self.cells = np.zeros((kv.num_blocks, max(*self.sizes, 2)), np.uint64)
        self.slots: dict[int, _Slot] = {}

    def execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """What the step draws; checks that the plan is one which a worker can run."""
        for slot in plan.released:
            del self.slots[slot]
        for new in plan.new_requests:
            assert new.slot > 0 and new.slot not in self.slots, new.slot
            self.slots[new.slot] = _Slot(new, self.width)
        for slot, group, index, block in plan.new_blocks.tolist():
            self.slots[slot].tables[group][index] = block
        counts = plan.num_scheduled.tolist()
        assert len(set(plan.slots.tolist())) == plan.num_rows > 0
        assert sorted(counts, key=lambda n: n > 1) == counts and min(counts) > 0
        token_ids = np.full((plan.num_rows, 1 + self.num_drafts), -1, np.int32)
        num_tokens = np.zeros(plan.num_rows, np.int32)
        output = ModelRunnerOutput(token_ids, num_tokens)
        self.num_tokens += sum(counts)
        slots = plan.slots.tolist()
        # rows of a step run at the same time: none may count on another's writes
        for i in self.rng.sample(range(plan.num_rows), plan.num_rows):
            drawn = self._row(plan, output, i, self.slots[slots[i]])
            num_tokens[i] = len(drawn)
            token_ids[i, : len(drawn)] = drawn
        return output

    def _row(
        self, plan: SchedulerOutput, output: ModelRunnerOutput, i: int, slot: _Slot
    ) -> list[int]:
        start, count = int(plan.num_computed[i]), int(plan.num_scheduled[i])
        num_drafts = int(plan.num_drafts[i])
        end = start + count - num_drafts  # of the tokens that are certain
        assert end <= len(slot.tokens), "tokens that nobody has drawn yet"
        assert bool(plan.sample[i]) == (end == len(slot.tokens))
        drafts = slot.drafts[:num_drafts]
        assert len(drafts) == num_drafts
        self._write(slot, start, slot.tokens[start:end] + drafts)
        drawn: list[int] = []
        if plan.sample[i]:
            for j in range(num_drafts + 1):
                drawn.append(self._draw_at(slot, end + j))
                if j < num_drafts and drafts[j] != drawn[-1]:
                    break
            self.num_accepted += len(drawn) - 1
        if self.nan_rate and self.rng.random() < self.nan_rate:
            self.num_nan += 1
            self._write(slot, start, [self.rng.randrange(VOCABULARY) for _ in range(count)])
            if output.invalid is None:
                output.invalid = np.zeros(plan.num_rows, np.bool_)
            output.invalid[i] = True
            drawn = [self.rng.randrange(VOCABULARY) for _ in drawn]
        slot.tokens += drawn
        if drawn and self.num_drafts:
            slot.drafts = self._propose(slot)
        if drawn and slot.params.logprobs is not None:
            output.logprobs[i] = _columns(drawn)
        if plan.prompt_logprobs is not None and plan.prompt_logprobs[i]:
            scored = slot.tokens[start + 1 : min(start + count + 1, slot.num_prompt)]
            output.prompt_logprobs[i] = _columns(scored)
        return drawn

    def _cell(self, slot: _Slot, group: int, position: int) -> int:
        """What the cell of `position` holds; only the last state of a block is there."""
        size = self.sizes[group]
        cells = self.cells[slot.tables[group][position // size]]
        if isinstance(self.specs[group], RecurrentStateSpec):
            return int(cells[0]) ^ (int(cells[1]) - position) & _MASK
        return int(cells[position % size])

    def _write(self, slot: _Slot, start: int, tokens: list[int]) -> None:
        for g, size in enumerate(self.sizes):
            state = self._cell(slot, g, start - 1) if start else slot.content + g
            recurrent = isinstance(self.specs[g], RecurrentStateSpec)
            for position, token in enumerate(tokens, start):
                block = slot.tables[g][position // size]
                assert block, f"position {position} of group {g} has no block"
                state = chain(state, token)
                if recurrent:
                    self.cells[block, 0] = state
                    self.cells[block, 1] = position
                else:
                    self.cells[block, position % size] = state

    def _draw_at(self, slot: _Slot, stop: int) -> int:
        digests = []
        for g, (spec, size) in enumerate(zip(self.specs, self.sizes, strict=True)):
            if isinstance(spec, RecurrentStateSpec):
                state = np.array([self._cell(slot, g, stop - 1)], np.uint64)
                digests.append(_digest(state, stop))
                continue
            start = max(stop - spec.window, 0) if isinstance(spec, SlidingWindowSpec) else 0
            first = start // size
            blocks = slot.tables[g][first : (stop - 1) // size + 1]
            cells = self.cells[blocks, :size].reshape(-1)
            digests.append(_digest(cells[start - first * size : stop - first * size], stop))
        return _draw(digests, slot.seed)

    def _propose(self, slot: _Slot) -> list[int]:
        """Guesses, about half of them right."""
        solo = Solo(self.specs, slot.content, slot.seed)
        solo.feed(slot.tokens)
        drafts: list[int] = []
        for _ in range(self.num_drafts):
            right = self.rng.random() < 0.6
            drafts.append(solo.draw() if right else self.rng.randrange(VOCABULARY))
            solo.feed(drafts[-1:])
        return drafts


def _columns(tokens: list[int]) -> LogprobColumns:
    ids = np.array(tokens, np.int32).reshape(-1, 1)
    return LogprobColumns.pack(ids, -ids.astype(np.float32), np.ones(len(ids), np.int32))
