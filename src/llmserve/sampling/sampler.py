# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""From a step's logits to its tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llmserve.core.messages import LogprobColumns
from llmserve.core.scheduler_output import NewRequest
from llmserve.errors import ConfigError
from llmserve.kernels.draw import Drawn, draw_rows
from llmserve.kernels.gumbel import row_keys
from llmserve.kernels.token_mask import mask_logits
from llmserve.kernels.triton_jit import use_triton
from llmserve.sampling.allowed_tokens import AllowedTokens
from llmserve.sampling.bad_words import BadWords
from llmserve.sampling.base import LogitsProcessor, Rows, SamplerContext, send, to_device
from llmserve.sampling.draw import draw
from llmserve.sampling.grammar import GrammarMask
from llmserve.sampling.logit_bias import LogitBias
from llmserve.sampling.logprobs import Group, HostColumns, Logprobs, columns
from llmserve.sampling.min_tokens import MinTokens
from llmserve.sampling.penalties import Penalties
from llmserve.sampling.truncation import Limits, Truncation
from llmserve.utils.guard import guarded
from llmserve.utils.logger import get_logger
from llmserve.utils.registry import load

logger = get_logger(__name__)

# In vLLM's order. Own processors come after all of these: they have the last word on the logits.
# Temperature, min_p, top_k and top_p belong to the draw: they need no logits rewritten.
PIPELINE: list[type[LogitsProcessor]] = [
    AllowedTokens,  # overwrites whole rows with -inf: first, while there is nothing to lose
    GrammarMask,  # only forbids, as the next two: their order among each other is free,
    BadWords,
    MinTokens,  # and nothing after them can bring a forbidden token back
    LogitBias,  # before penalties, which look at the sign of the biased logit
    Penalties,
]
# A lower one above 0 is raised to it, as in vLLM: logits / temperature stay far from overflow.
MIN_TEMPERATURE = 0.01
_BROKEN = 2  # where 1 is a row whose logits are invalid


@dataclass(slots=True)
class SampledBatch:
    """What one `Sampler.sample` drew."""

    # int64 [2, n], on the device: ids; 0 for a fine row, 1 for invalid logits, 2 for broken code
    tokens: Tensor
    _columns: list[tuple[Rows, HostColumns]] = field(default_factory=list)

    @property
    def token_ids(self) -> Tensor:
        """int64 [n]"""
        return self.tokens[0]

    def logprob_columns(self) -> dict[int, LogprobColumns]:
        """By row, for rows that asked. To be called after the device has finished the step."""
        result: dict[int, LogprobColumns] = {}
        for rows, host in self._columns:
            parts = LogprobColumns.pack_each(*(part.numpy() for part in host))
            result.update(zip(rows.index_cpu.tolist(), parts, strict=True))
        return result


@dataclass(slots=True)
class _Batch:
    """What follows from the slots of a batch alone; kept while they stay the same."""

    slots: bytes
    processors: list[tuple[LogitsProcessor, Rows]]
    is_changed: bool  # by any but a grammar's mask
    logprobs: list[Group]
    draw: "_KernelDraw | _TorchDraw"


@dataclass(slots=True)
class _KernelDraw:
    """All rows in one or two launches."""

    slots: Tensor  # int64 [n]
    random: bool
    truncated: bool


@dataclass(slots=True)
class _TorchDraw:
    """Rows by what they ask for."""

    greedy: Rows
    # rows, temperature [m, 1], seeds [m], limits
    random: list[tuple[Rows, Tensor, Tensor, Limits | None]]


class Sampler:
    """Draws a token for every row: argmax(logit / T + Gumbel(seed, output index, token id)).

    A draw depends on its own row alone. Slots are rows of persistent state, 1 .. num_slots - 1; 0
    is padding. `processors` are import paths of LogitsProcessor classes (see base.py); ConfigError
    if one cannot be used.
    """

    def __init__(
        self,
        num_slots: int,
        logits_width: int,
        device: torch.device,
        *,
        eos_token_ids: list[int],
        logprobs_mode: str = "raw_logprobs",
        processors: Sequence[str] = (),
    ) -> None:
        context = SamplerContext(num_slots, logits_width, device, eos_token_ids)
        kinds = [*PIPELINE, *map(_load_processor, processors)]
        self._context = context
        self._processors = [kind(context) for kind in kinds]
        self.grammar = next(p for p in self._processors if isinstance(p, GrammarMask))
        self._active = np.zeros((len(kinds), num_slots), np.bool_)
        self._truncation = Truncation(context)
        self._logprobs = Logprobs(context)
        self._raw_logprobs = logprobs_mode == "raw_logprobs"
        self._temperature = np.zeros(num_slots, np.float32)
        self._seeds = np.zeros(num_slots, np.int64)
        self._batch: _Batch | None = None
        # On the device, at addresses that stay. Requests that come are sent when a batch has them
        self._device_params = torch.zeros(num_slots, 4, device=device)
        self._device_seeds = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._arrived = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._is_sent = True
        self._broken: set[int] = set()  # slots whose own code has raised
        self._has_kernel = use_triton(self._arrived)

    def add(self, request: NewRequest) -> None:
        """A request enters `request.slot`, new or resumed after preemption; sets all its state."""
        slot, temperature = request.slot, request.params.temperature
        self._batch = None
        self._broken.discard(slot)
        for active, processor in zip(self._active, self._processors, strict=True):
            active[slot] = guarded(
                partial(processor.add, slot, request), partial(self._break, slot)
            )
        self._truncation.add(slot, request)
        self._logprobs.add(slot, request)
        self._temperature[slot] = max(temperature, MIN_TEMPERATURE) if temperature else 0.0
        self._seeds[slot] = request.seed
        self._is_sent = False

    def remove(self, slot: int) -> None:
        """The request in `slot` has gone; the slot may be used again."""
        self._batch = None
        self._broken.discard(slot)
        for active, processor in zip(self._active, self._processors, strict=True):
            if active[slot]:
                active[slot] = False
                guarded(partial(processor.remove, slot), _log_broken)

    def _break(self, slot: int, error: Exception) -> bool:
        """The request in `slot` is to end, and its processors have no more to do. Returns False."""
        _log_broken(error)
        self._batch = None
        self._broken.add(slot)
        for active, processor in zip(self._active, self._processors, strict=True):
            if active[slot] and processor is not self.grammar:  # the step's mask has its row
                active[slot] = False
                guarded(partial(processor.remove, slot), _log_broken)
        return False

    def break_rows(self, error: Exception, logits: Tensor, slots: np.ndarray) -> None:
        """Finds whose code made `sample` raise `error`, so that `sample` can be called again.

        Raises `error` if it was nobody's. `logits` [n, logits_width] is not changed.
        """
        batch = self._batch_of(slots)
        broken: dict[int, Exception] = {}
        for processor, rows in batch.processors:
            if processor is self.grammar:  # which takes the rows of a mask together
                continue
            for index, slot, output_index in zip(
                rows.index_cpu, rows.slots_cpu.tolist(), rows.output_index_cpu, strict=True
            ):
                one = Rows(np.array([index]), np.array([slot]), self._context.device)
                one.output_index_cpu = np.array([output_index])
                alone = one.of(logits).clone()
                reason = guarded(partial(_raised, processor, alone, one), _itself)
                if reason is not None:
                    broken[slot] = reason
        if not broken:
            raise error
        for slot, reason in broken.items():
            self._break(slot, reason)

    def sample(self, logits: Tensor, slots: np.ndarray, output_index: np.ndarray) -> SampledBatch:
        """Enqueues one draw a row and returns without waiting for the device.

        `logits` float32 [n, logits_width], overwritten. `slots` int32 [n]; `output_index` int32
        [n]: how many tokens the request has drawn before. A row is invalid, and its token 0, if its
        logits hold NaN or +inf or are all -inf, or if its parameters forbid every token. What a
        processor's `apply` raises comes before any state has changed.
        """
        batch = self._batch_of(slots)
        output_index = output_index.astype(np.int64)
        for _, rows in batch.processors:
            rows.output_index_cpu = output_index[rows.index_cpu]
        logits = logits.contiguous()
        # Without processors, the draw sees the same logits and finds as much; under a mask, it is
        # the allowed tokens that count
        bad = logits.amax(1).isfinite().logical_not_() if batch.is_changed else None
        scored: list[Tensor] = []
        if self._raw_logprobs:
            scored = [rows.of(logits) for rows, _, _ in batch.logprobs]
            if batch.processors:
                scored = [part.clone() for part in scored]

        for processor, rows in batch.processors:
            part = rows.of(logits)
            processor.apply(part, rows)
            rows.put(logits, part)

        token_ids, invalid, lowest = self._draw(logits, batch.draw, output_index)
        if bad is not None:
            invalid |= bad
            token_ids.masked_fill_(invalid, 0)
        for processor, rows in batch.processors:
            guarded(
                partial(processor.update, rows, rows.of(token_ids)),
                partial(self._break_all, rows.slots_cpu),
            )
        if not self._raw_logprobs:
            scored = [self._processed(logits, rows, lowest) for rows, _, _ in batch.logprobs]
        host = [
            (rows, columns(values, rows.of(token_ids), k, given))
            for (rows, k, given), values in zip(batch.logprobs, scored, strict=True)
        ]
        failed = invalid.long()
        if self._broken:
            lost = np.flatnonzero(np.isin(slots, list(self._broken)))
            failed[to_device(lost, failed.device)] = _BROKEN
        return SampledBatch(torch.stack((token_ids, failed)), host)

    def _break_all(self, slots: np.ndarray, error: Exception) -> None:
        for slot in slots.tolist():  # whose state was brought up to date, nobody knows
            self._break(slot, error)

    def plain_draw(self, slots: np.ndarray) -> bool | None:
        """Whether any of the rows is random, if nothing but a draw, under a mask or not, is asked
        for; else None."""
        batch = self._batch_of(slots)
        if batch.is_changed or batch.logprobs or self._broken:
            return None
        return batch.draw.random if isinstance(batch.draw, _KernelDraw) else None

    def write_mask(self, slots: np.ndarray, words: np.ndarray) -> bool:
        """Whether the step has a mask; it is then in `words` int32 [n or more, ceil(logits_width /
        32)], -1 for rows that are not bound."""
        for processor, rows in self._batch_of(slots).processors:
            if processor is self.grammar and (mask := self.grammar.words(rows)) is not None:
                words[: len(slots)] = -1
                words[rows.index_cpu] = mask
                return True
        return False

    def draw_plain(
        self,
        logits: Tensor,
        slots: Tensor,
        output_index: Tensor,
        random: bool,
        words: Tensor | None,
    ) -> Tensor:
        """`sample` of rows whose `plain_draw` is so (not random, if `random` is False), without
        the host: can be captured. `slots`, `output_index` int64 [n], `words` on the device;
        returns int64 [2, n] as in SampledBatch."""
        if words is not None:
            mask_logits(logits, words)
        token_ids, invalid, _ = draw_rows(
            logits, slots, self._device_params, self._device_seeds, output_index, self._arrived,
            random=random, truncated=random,
        )  # fmt: skip
        return torch.stack((token_ids, invalid.long()))

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, k: int) -> LogprobColumns:
        """Of `targets` int64 [m] under `logits` [m, logits_width] (one or more rows), always raw.

        `k` alternatives each, -1 = all. Waits for the device.
        """
        return self._logprobs.prompt(logits.float(), targets, k)

    def _draw(
        self, logits: Tensor, draws: _KernelDraw | _TorchDraw, output_index: np.ndarray
    ) -> Drawn:
        if isinstance(draws, _TorchDraw):
            return _draw_groups(logits, draws, output_index)
        n = len(logits)
        arrived = self._arrived
        if n > len(arrived):  # drafts: several rows of a slot
            arrived = torch.zeros(n, dtype=torch.int32, device=logits.device)
        index = to_device(output_index, logits.device) if draws.random else draws.slots
        return draw_rows(
            logits, draws.slots, self._device_params, self._device_seeds, index, arrived,
            random=draws.random, truncated=draws.truncated,
        )  # fmt: skip

    def _processed(self, logits: Tensor, rows: Rows, lowest: Tensor | None) -> Tensor:
        # The distribution that was drawn from; a greedy row's is that of temperature 1
        temperature = self._temperature[rows.slots_cpu]
        temperature = np.where(temperature == 0, np.float32(1), temperature)[:, None]
        x = rows.of(logits) / to_device(temperature, logits.device)
        if lowest is not None:
            x.masked_fill_(x < rows.of(lowest), -math.inf)
        return x

    def _batch_of(self, slots: np.ndarray) -> _Batch:
        key = slots.tobytes()
        if self._batch is not None and self._batch.slots == key:
            return self._batch
        device = self._context.device
        slots = slots.astype(np.int64)

        def select(mask: np.ndarray) -> Rows:
            index = np.flatnonzero(mask)
            return Rows(index, slots[index], device)

        random = self._temperature[slots] > 0
        truncated = random & self._truncation.active[slots]
        draws: _KernelDraw | _TorchDraw
        if self._has_kernel:
            if not self._is_sent:
                send(self._device_params, self._truncation.table(self._temperature))
                send(self._device_seeds, self._seeds)
                self._is_sent = True
            draws = _KernelDraw(to_device(slots, device), bool(random.any()), bool(truncated.any()))
        else:
            groups: list[tuple[Rows, Tensor, Tensor, Limits | None]] = []
            for mask, is_truncated in ((random & ~truncated, False), (truncated, True)):
                if mask.any():
                    rows = select(mask)
                    temperature = to_device(self._temperature[rows.slots_cpu][:, None], device)
                    seeds = to_device(self._seeds[rows.slots_cpu], device)
                    limits = self._truncation.limits(rows.slots_cpu) if is_truncated else None
                    groups.append((rows, temperature, seeds, limits))
            draws = _TorchDraw(select(~random), groups)
        processors = [
            (processor, select(mask))
            for processor, mask in zip(self._processors, self._active[:, slots], strict=True)
            if mask.any()
        ]
        self._batch = _Batch(
            slots=key,
            processors=processors,
            is_changed=any(processor is not self.grammar for processor, _ in processors),
            logprobs=self._logprobs.groups(slots),
            draw=draws,
        )
        return self._batch


def _raised(processor: LogitsProcessor, logits: Tensor, rows: Rows) -> Exception | None:
    processor.apply(logits, rows)
    return None


def _itself(error: Exception) -> Exception | None:
    return error


def _log_broken(error: Exception) -> None:
    logger.error("a request's sampling failed", exc_info=error)


def _draw_groups(logits: Tensor, draws: _TorchDraw, output_index: np.ndarray) -> Drawn:
    n = len(logits)
    token_ids = torch.zeros(n, dtype=torch.int64)
    score = torch.zeros(n)
    lowest = torch.full((n, 1), -math.inf)
    if len(draws.greedy):
        best = draws.greedy.of(logits).max(1)
        draws.greedy.put(token_ids, best.indices)
        draws.greedy.put(score, best.values)
    for rows, temperature, seeds, limits in draws.random:
        index = torch.from_numpy(output_index[rows.index_cpu])
        drawn = draw(rows.of(logits), temperature, row_keys(seeds, index), limits)
        for whole, part in zip((token_ids, score, lowest), drawn, strict=True):
            rows.put(whole, part)
    invalid = score.isfinite().logical_not_()
    return token_ids.masked_fill_(invalid, 0), invalid, lowest


def _load_processor(path: str) -> type[LogitsProcessor]:
    problem = "is not a subclass of llmserve.sampling.base.LogitsProcessor"
    try:
        kind = load(path)
        if isinstance(kind, type) and issubclass(kind, LogitsProcessor):
            return kind
    except (ImportError, AttributeError, ValueError) as error:
        problem = f"cannot be imported as package.module:Class ({error})"
    raise ConfigError(f"--logits-processors: {path!r} {problem}")
