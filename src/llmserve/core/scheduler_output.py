# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What one step does: the only thing that scheduler and workers say to each other.

Arrays go over process edges as raw bytes (`encode`, `decode`); in one process the object itself is
handed over. Slots are rows of the workers' persistent state; slot 0 and block 0 are sinks for
padding and are never given to a request.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from llmserve.core.messages import LogprobColumns
from llmserve.core.sampling_params import SamplingParams


class NewRequest(msgspec.Struct, array_like=True):
    """A request that enters a slot: new, or resumed after preemption (then with its output).

    `token_ids` int32 [num_tokens]; the first `num_prompt_tokens` are the prompt. `seed` is resolved
    (params.seed may be None). `blocks[g]` are the block ids of KV group g from position 0 on.
    """

    slot: int
    token_ids: np.ndarray
    num_prompt_tokens: int
    seed: int
    params: SamplingParams
    blocks: list[list[int]]


class TokenMask(msgspec.Struct, array_like=True):
    """Which tokens the next draw of some slots may give, one bit a token.

    `slots` int32 [m]; `words` int32 [m, ceil(logits_width / 32)], token t is bit t % 32 of word
    t // 32.
    """

    slots: np.ndarray
    words: np.ndarray


@dataclass(slots=True)
class LateMask:
    """A mask that may be written after the `sample` of its step, whose draw waits until `release`,
    which must come; but not before the results of the steps before are there.

    `words` int32 [num_rows, ceil(logits_width / 32)].
    """

    words: np.ndarray
    release: Callable[[], None]


class SchedulerOutput(msgspec.Struct, array_like=True):
    """One step's plan. Rows with one token to do come first (decodes), then the longer ones.

    Row i runs positions [num_computed[i], num_computed[i] + num_scheduled[i]) of the request in
    `slots[i]`. Tokens past what the worker knows of the slot are the slot's last sampled token,
    which need not be known to the host. `num_drafts[i]` of the scheduled tokens are the slot's
    draft tokens. `sample[i]`: the row reaches its last token, so it draws. `prompt_logprobs[i]`:
    report the prompt positions that the row computes.
    `new_blocks` int32 [n, 4]: (slot, group, index in the block table, block id).
    `released` slots are emptied before `new_requests` enter theirs.
    """

    step: int
    slots: np.ndarray  # int32 [num_rows]
    num_computed: np.ndarray  # int32 [num_rows]
    num_scheduled: np.ndarray  # int32 [num_rows]
    num_drafts: np.ndarray  # int32 [num_rows]
    sample: np.ndarray  # bool [num_rows]
    new_blocks: np.ndarray  # int32 [n, 4]
    new_requests: list[NewRequest] = []
    released: list[int] = []
    prompt_logprobs: np.ndarray | None = None  # bool [num_rows]; None = no row
    mask: TokenMask | None = None  # set between `forward` and `sample`

    @property
    def num_rows(self) -> int:
        """Requests in this step."""
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens in this step."""
        return int(self.num_scheduled.sum())


class ModelRunnerOutput(msgspec.Struct, array_like=True):
    """What a step drew. Row order is the plan's.

    Row i drew `token_ids[i, :num_tokens[i]]`; 0 tokens where it did not sample. With speculation a
    row draws up to 1 + k. `invalid[i]` is not 0 where its tokens mean nothing: 1, the row's logits
    were not finite; 2, its own code raised. `logprobs[i]` covers row i's drawn tokens,
    `prompt_logprobs[i]` the prompt positions [num_computed + 1, num_computed + num_scheduled] of
    row i, as far as they are prompt. `seconds` is what the step has held up those behind it: the
    device's time from the end of the step before, or from its own beginning where that came later.
    """

    token_ids: np.ndarray  # int32 [num_rows, 1 + k]
    num_tokens: np.ndarray  # int32 [num_rows]
    invalid: np.ndarray | None = None  # bool or int8 [num_rows]; None = all fine
    logprobs: dict[int, LogprobColumns] = {}
    prompt_logprobs: dict[int, LogprobColumns] = {}
    seconds: float = 0.0  # 0: not known


def _enc_hook(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), value.tobytes()]
    raise NotImplementedError(type(value))


def _dec_hook(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        dtype, shape, data = value
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)
    raise NotImplementedError(kind)


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
_plan_decoder = msgspec.msgpack.Decoder(SchedulerOutput, dec_hook=_dec_hook)
_output_decoder = msgspec.msgpack.Decoder(ModelRunnerOutput, dec_hook=_dec_hook)
_mask_decoder = msgspec.msgpack.Decoder(TokenMask | None, dec_hook=_dec_hook)


def encode(value: SchedulerOutput | ModelRunnerOutput | TokenMask | None) -> bytes:
    """For a process edge."""
    return _encoder.encode(value)


def decode_plan(data: bytes) -> SchedulerOutput:
    """Inverse of `encode`; arrays are read-only."""
    return _plan_decoder.decode(data)


def decode_output(data: bytes) -> ModelRunnerOutput:
    """Inverse of `encode`; arrays are read-only."""
    return _output_decoder.decode(data)


def decode_mask(data: bytes) -> TokenMask | None:
    """Inverse of `encode`; torch takes the words as they are, so they are a copy."""
    mask: TokenMask | None = _mask_decoder.decode(data)
    if mask is not None:
        mask.words = mask.words.copy()
    return mask
