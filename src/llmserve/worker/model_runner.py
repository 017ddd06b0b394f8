# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One step on the device: a plan in, tokens out."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from llmserve.attention.base import AttentionBackend
from llmserve.attention.registry import choose
from llmserve.core.kv_spec import KVCacheConfig
from llmserve.core.messages import LogprobColumns
from llmserve.core.scheduler_output import LateMask, ModelRunnerOutput, SchedulerOutput
from llmserve.kernels.cpu import library
from llmserve.layers.forward_batch import ForwardBatch, LayerKV
from llmserve.models.interfaces import CausalLM
from llmserve.sampling.sampler import SampledBatch, Sampler
from llmserve.spec_decode.base import Proposer
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger
from llmserve.worker import kv_tensors
from llmserve.worker.cpu_program import MAX_ROWS, DecodeProgram
from llmserve.worker.cuda_graph import MAX_WHOLE, StepGraphs
from llmserve.worker.input_batch import InputBatcher, StepInputs
from llmserve.worker.piecewise import PieceGraphs
from llmserve.worker.request_slots import RequestSlots
from llmserve.worker.step_clock import StepClock

logger = get_logger(__name__)

_LOGITS_SLICE = 64  # prompt positions whose logits are held at once


@dataclass(slots=True)
class _Forward:
    """A step whose hidden states are computed or enqueued."""

    plan: SchedulerOutput
    inputs: StepInputs
    hidden: torch.Tensor  # [num_tokens, hidden], padding behind it
    late_mask: int | None = None  # that of the gate


class ModelRunner:
    """Executes plans in the order given. Every method may be called from one thread only.

    With `proposer`, each drawn token is followed by `num_drafts` guesses, padded with token 0; the
    plans then have to come after the results of the step before. Features that count drawn tokens
    (penalties, bad_words) would count rejected ones too: such requests must bring no drafts.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_config: KVCacheConfig,
        sampler: Sampler,
        *,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        attention_backend: str | None = None,
        proposer: Proposer | None = None,
        num_drafts: int = 0,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.device = device
        self.slots = RequestSlots(num_slots, max_model_len, kv_config, device)
        self.batcher = InputBatcher(self.slots)
        self.clock = StepClock(device)
        self.proposer = proposer
        self.drafts = np.zeros((num_slots, num_drafts), np.int32)
        self.prompt_logprobs = np.zeros(num_slots, np.int64)
        family = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
        caches = kv_tensors.allocate(kv_config, dtype, device)
        self.backends: dict[tuple[int, object], AttentionBackend] = {}
        self._layers: list[tuple[torch.Tensor, AttentionBackend, int]] = []
        group_of = {layer: g for g, group in enumerate(kv_config.groups) for layer in group.layers}
        for layer, shape in enumerate(model.attention_shapes):
            key = (group_of[layer], shape)
            if key not in self.backends:
                kind = choose(shape, dtype, family, attention_backend)
                self.backends[key] = kind(shape, dtype, device)
            self._layers.append((caches[layer], self.backends[key], group_of[layer]))
        self._started: _Forward | None = None
        self.max_model_len = max_model_len
        self.graphs: StepGraphs | None = None
        self.pieces: PieceGraphs | None = None
        self.program: DecodeProgram | None = None

    @torch.inference_mode()
    def forward(self, plan: SchedulerOutput) -> None:
        """Applies the plan's changes to the slots and computes its hidden states."""
        self.clock.begin()
        for slot in plan.released:
            self.sampler.remove(slot)
        for request in plan.new_requests:
            self.sampler.add(request)
            self.prompt_logprobs[request.slot] = request.params.prompt_logprobs or 0
        self.slots.apply(plan.new_requests, plan.new_blocks)
        replayed = None if self.graphs is None else self.graphs.replay(plan)
        if replayed is not None:
            inputs, hidden = replayed
        else:
            inputs = self.batcher.build(plan, self.drafts if plan.num_drafts.any() else None)
            if self.program is not None and self.program.holds(inputs):
                hidden = self.program.run(inputs)
            else:
                hidden = self._hidden(inputs)
        self._started = _Forward(plan, inputs, hidden)

    def late_mask(self) -> LateMask | None:
        """See Executor."""
        started, graphs = self._started, self.graphs
        assert started is not None
        if self._plain_draw(started.inputs) is None or graphs is None or not graphs.gate.can_wait:
            return None
        started.late_mask = number = graphs.gate.next()
        words = graphs.gate.words[: len(started.inputs.draw_rows)]
        return LateMask(words, partial(graphs.gate.open, number))

    def _plain_draw(self, inputs: StepInputs) -> bool | None:
        """Whether any row is random, of a step whose draw is a graph; else None."""
        if self.graphs is None or not inputs.decodes or self.proposer is not None:
            return None
        return self.sampler.plain_draw(inputs.draw_slots)

    def _hidden(self, inputs: StepInputs) -> torch.Tensor:
        """[num_tokens, hidden], padding behind it"""
        for (group, _), backend in self.backends.items():
            backend.plan(inputs.metadata[group])
        hidden = None if self.pieces is None else self.pieces.replay(inputs)
        if hidden is not None:
            return hidden
        layers = [LayerKV(kv, backend, inputs.metadata[g]) for kv, backend, g in self._layers]
        return self.model.forward(ForwardBatch(inputs.input_ids, inputs.positions, layers))

    @torch.inference_mode()
    def capture(self, mode: str, sizes: list[int], mixed: list[int], max_rows: int) -> None:
        """Decode steps of up to `sizes[-1]` rows, and steps with prompts of up to `mixed[-1]`
        tokens and `max_rows` rows, are replayed from CUDA graphs from now on, as far as `mode`
        (--cudagraph-mode) and the attention backends allow."""
        kinds = {backend.capabilities.graph for backend in self.backends.values()}
        most = {"FULL": mixed[-1] if mixed else 0, "FULL_AND_PIECEWISE": MAX_WHOLE}.get(mode, 0)
        whole = [size for size in mixed if size <= most and kinds == {"mixed"}]
        pool, pieces = torch.cuda.graph_pool_handle(), None
        if "PIECEWISE" in mode and len(whole) < len(mixed):
            rest = [size for size in mixed if size not in whole]
            pieces = PieceGraphs(self.batcher, self._layers, rest, pool, self.model.forward)
        if "FULL" in mode and "none" not in kinds:
            self.graphs = StepGraphs(
                self.batcher, sizes, whole, max_rows, self.max_model_len, pool,
                self._hidden, self._draw, -(-self.model.logits_width // 32),
            )  # fmt: skip
        self.pieces = pieces  # not before: the graphs above hold whole forwards

    @torch.inference_mode()
    def record(self, max_rows: int) -> None:
        """Decode steps of up to `max_rows` rows are one call from now on, on a CPU with compiled
        kernels and if the model needs no others."""
        lib = library() if self.device.type == "cpu" else None
        if lib is None:
            return
        program = DecodeProgram(lib, self.slots, min(max_rows, MAX_ROWS), self._hidden)
        if program.foreign is None:
            self.program = program
        else:
            logger.info("decode steps are not recorded: %s is no compiled kernel", program.foreign)

    def _draw(
        self,
        hidden: torch.Tensor,
        slots: torch.Tensor,
        output_index: torch.Tensor,
        random: bool,
        words: torch.Tensor | None,
    ) -> torch.Tensor:
        logits = self.model.logits(hidden)
        tokens = self.sampler.draw_plain(logits, slots, output_index, random, words)
        self.slots.last_token.index_copy_(0, slots, tokens[0])
        return tokens

    @torch.inference_mode()
    def sample(self, plan: SchedulerOutput) -> "StepResult":
        """Logits and draw of the plan given to the last `forward`."""
        started, self._started = self._started, None
        assert started is not None and started.plan.step == plan.step, "sample without its forward"
        inputs = started.inputs
        sampled = self._sample(started) if len(inputs.draw_rows) else None
        result = StepResult(self, plan, inputs, sampled)
        if plan.prompt_logprobs is not None:
            self._score_prompts(started, result.prompt_logprobs)
        return result

    def _sample(self, started: _Forward) -> SampledBatch:
        inputs, hidden = started.inputs, started.hidden
        self.sampler.grammar.mask = started.plan.mask
        random = self._plain_draw(inputs)
        if random is not None:
            assert self.graphs is not None
            number = started.late_mask
            if number is None and self.sampler.write_mask(
                inputs.draw_slots, self.graphs.gate.words
            ):
                number = self.graphs.gate.next()
                self.graphs.gate.open(number)
            return SampledBatch(self.graphs.draw(inputs, random, number))
        rows = len(inputs.draw_rows)
        if inputs.decodes:
            hidden = hidden[:rows]
        elif rows != len(hidden):
            hidden = hidden.index_select(0, inputs.logits_rows)
        sampled = guarded(
            lambda: self._draw_rows(hidden, inputs),
            lambda error: self._draw_others(hidden, inputs, error),
        )
        if self.proposer is None:
            self.slots.last_token.index_copy_(0, inputs.last_slots, sampled.token_ids)
        return sampled

    def _draw_rows(self, hidden: torch.Tensor, inputs: StepInputs) -> SampledBatch:
        logits = self.model.logits(hidden)
        return self.sampler.sample(logits, inputs.draw_slots, inputs.draw_index)

    def _draw_others(
        self, hidden: torch.Tensor, inputs: StepInputs, error: Exception
    ) -> SampledBatch:
        """Once more from the start, without the code of the requests that made it fail."""
        self.sampler.break_rows(error, self.model.logits(hidden), inputs.draw_slots)
        return self._draw_rows(hidden, inputs)

    def _score_prompts(self, started: _Forward, scores: dict[int, LogprobColumns]) -> None:
        plan = started.plan
        assert plan.prompt_logprobs is not None
        for row in np.flatnonzero(plan.prompt_logprobs).tolist():
            slot = int(plan.slots[row])
            first = int(plan.num_computed[row]) + 1
            stop = min(
                first + int(plan.num_scheduled[row]), int(self.slots.num_prompt_tokens[slot])
            )
            targets = torch.from_numpy(self.slots.tokens[slot, first:stop].astype(np.int64))
            targets = targets.to(self.device)
            hidden = started.hidden[int(started.inputs.token_starts[row]) :]
            parts = [
                self.sampler.prompt_logprobs(
                    self.model.logits(hidden[low : low + len(target)]),
                    target,
                    int(self.prompt_logprobs[slot]),
                )
                for low in range(0, len(targets), _LOGITS_SLICE)
                for target in [targets[low : low + _LOGITS_SLICE]]
            ]
            if parts:
                scores[row] = _join(parts)

    def accept(self, plan: SchedulerOutput, drawn: np.ndarray, num_tokens: np.ndarray) -> None:
        """Cuts `num_tokens` [num_rows] at the first draft that was not drawn, and drafts anew.

        `drawn` int32 [num_rows, 1 + k]: what the target drew after the last token and each draft.
        """
        assert self.proposer is not None
        k = drawn.shape[1] - 1
        equal = drawn[:, :-1] == self.drafts[plan.slots, :k]
        equal &= np.arange(k) < plan.num_drafts[:, None]
        np.minimum(num_tokens, 1 + np.logical_and.accumulate(equal, 1).sum(1), out=num_tokens)
        for row in np.flatnonzero(num_tokens).tolist():
            slot, n = int(plan.slots[row]), int(num_tokens[row])
            start = int(self.slots.num_tokens[slot])
            tokens = self.slots.tokens[slot]
            n = min(n, len(tokens) - start)
            tokens[start : start + n] = drawn[row, :n]
            self.slots.num_tokens[slot] = start + n
            guesses = self.proposer.propose(tokens[: start + n], self.drafts.shape[1])
            self.drafts[slot] = 0
            self.drafts[slot, : len(guesses)] = guesses


class StepResult:
    """A step in flight. On CUDA its tokens are on their way to pinned memory.

    One that draws nothing is waited for too: rings of buffers (an attention backend's plans) hold
    as many steps as the engine has in flight, and chunks of a long prompt draw nothing for many.
    """

    def __init__(
        self,
        runner: ModelRunner,
        plan: SchedulerOutput,
        inputs: StepInputs,
        sampled: SampledBatch | None,
    ) -> None:
        self.prompt_logprobs: dict[int, LogprobColumns] = {}
        self._runner = runner
        self._plan = plan
        self._inputs = inputs
        self._sampled = sampled
        if sampled is not None:
            self._tokens = sampled.tokens
            if self._tokens.is_cuda:
                pinned = torch.empty(self._tokens.shape, dtype=torch.int64, pin_memory=True)
                self._tokens = pinned.copy_(self._tokens, non_blocking=True)
        self._time = runner.clock.end()

    def result(self) -> ModelRunnerOutput:
        """Waits for the step, and has its tokens."""
        plan, rows = self._plan, self._inputs.draw_rows
        draws = np.where(plan.sample, 1 + plan.num_drafts, 0).astype(np.int32)
        output = ModelRunnerOutput(
            np.zeros((plan.num_rows, max(1, int(draws.max()))), np.int32), draws
        )
        output.prompt_logprobs = self.prompt_logprobs
        output.seconds = self._time.wait()
        if self._sampled is None:
            return output
        token_ids, invalid = self._tokens.numpy()
        nth = np.arange(len(rows)) - (np.cumsum(draws) - draws)[rows]
        output.token_ids[rows, nth] = token_ids
        if self._runner.proposer is not None:
            self._runner.accept(plan, output.token_ids, output.num_tokens)
        if invalid.any():
            output.invalid = np.zeros(plan.num_rows, np.int8)
            np.maximum.at(output.invalid, rows, invalid.astype(np.int8))
        parts: dict[int, list[LogprobColumns]] = {}
        for draw, columns in self._sampled.logprob_columns().items():
            row = int(rows[draw])
            if nth[draw] < output.num_tokens[row]:
                parts.setdefault(row, []).append(columns)
        output.logprobs = {row: _join(columns) for row, columns in parts.items()}
        return output


def _join(parts: list[LogprobColumns]) -> LogprobColumns:
    if len(parts) == 1:
        return parts[0]
    return LogprobColumns(
        sum(part.n for part in parts),
        parts[0].width,
        *(b"".join(getattr(part, name) for part in parts) for name in _COLUMNS),
    )


_COLUMNS = ("token_ids", "logprobs", "ranks")
