# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Everything that crosses the sockets between API server and engine, encoded by msgspec.

One message a step each way. Columns are raw little-endian numpy bytes: a step of 256 tokens is two
buffers, not 256 objects. A wire request id is a uint32 that its client counts up and never reuses.
"""

from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from llmserve.core.kv_spec import AnyKVSpec
from llmserve.core.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]
WireId = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
Index = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]  # which NaN is not


class EngineRequest(msgspec.Struct, array_like=True, tag="req", kw_only=True):
    """A request on its way to the engine. `prompt` is int32 token ids."""

    client: Index
    request_id: WireId
    prompt: bytes
    params: SamplingParams
    arrival: Seconds  # time.monotonic() of this host, seconds
    priority: int = 0
    cache_salt: str = ""
    deadline: Seconds = 0.0  # time.monotonic() of this host; 0 is none
    tenant: Index = 0  # requests of different tenants take turns

    @property
    def prompt_token_ids(self) -> np.ndarray:
        """int32 [prompt_len]."""
        return np.frombuffer(self.prompt, np.int32)


class AbortRequests(msgspec.Struct, array_like=True, tag="abort"):
    """Ids whose caller has gone, or whose stop string was found. Unknown ids are ignored."""

    client: Index
    request_ids: list[WireId]


class UtilityCall(msgspec.Struct, array_like=True, tag="call"):
    """A rare operation by name: `reset_prefix_cache`, `ping`. Answered by UtilityResult."""

    client: Index
    call_id: int
    method: str
    args: list[Any] = []


class Clients(msgspec.Struct, array_like=True, tag="clients"):
    """Sent by the supervisor: which clients there are from now on. What the others have running is
    aborted; new ones hear that the engine is ready. An index never comes back."""

    client: Index
    clients: list[Index]


ToEngine = EngineRequest | AbortRequests | UtilityCall | Clients


class LogprobColumns(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities of n positions with k alternatives each; column 0 is the token itself.

    `token_ids` int32 [n, k + 1], `logprobs` float32 [n, k + 1], `ranks` int32 [n] (1 = likeliest).
    """

    n: int
    width: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes

    def __post_init__(self) -> None:
        size, rows = 4 * self.n * self.width, 4 * self.n
        if min(self.n, self.width) < 0 or (
            (size, size, rows) != (len(self.token_ids), len(self.logprobs), len(self.ranks))
        ):
            raise ValueError(f"columns that are not {self.n} rows of {self.width}")

    @classmethod
    def pack(
        cls, token_ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray
    ) -> "LogprobColumns":
        """From arrays of the shapes above."""
        n, width = token_ids.shape
        return cls(
            n,
            width,
            token_ids.astype(np.int32).tobytes(),
            logprobs.astype(np.float32).tobytes(),
            ranks.astype(np.int32).tobytes(),
        )

    @classmethod
    def pack_each(
        cls, token_ids: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray
    ) -> "list[LogprobColumns]":
        """`pack` of every position alone."""
        whole = cls.pack(token_ids, logprobs, ranks)
        width, size = whole.width, 4 * whole.width
        return [
            cls(1, width, whole.token_ids[at : at + size], whole.logprobs[at : at + size],
                whole.ranks[4 * row : 4 * row + 4])
            for row, at in enumerate(range(0, size * whole.n, size))
        ]  # fmt: skip

    def unpack(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`token_ids`, `logprobs`, `ranks` as arrays."""
        return (
            np.frombuffer(self.token_ids, np.int32).reshape(self.n, self.width),
            np.frombuffer(self.logprobs, np.float32).reshape(self.n, self.width),
            np.frombuffer(self.ranks, np.int32),
        )


class RequestExtra(msgspec.Struct, array_like=True, kw_only=True, gc=False):
    """The rare rest of one request in one step.

    `logprobs` covers this step's new tokens; `prompt_logprobs` this step's prompt positions (the
    first position of a prompt has none). `num_cached_tokens` and `queue_time` (seconds from
    arrival to the first schedule) come with the first token. `error` is a code of errors.py with
    `finish_reason` "error".
    """

    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    logprobs: LogprobColumns | None = None
    prompt_logprobs: LogprobColumns | None = None
    num_cached_tokens: int | None = None
    queue_time: float | None = None
    num_preemptions: int = 0
    error: str | None = None
    message: str | None = None


# What a process may compile, or load of what was compiled before.
COMPILATION_KINDS = ("triton", "triton_load", "flashinfer", "flashinfer_load")


class SchedulerStats(msgspec.Struct, array_like=True, kw_only=True):
    """Gauges as they stand after a step, and counters since the engine's start."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_total: int = 0
    num_blocks_free: int = 0  # never used, or released and not cached
    num_blocks_cached: int = 0  # released but reusable by a prefix hit
    prefix_queries: int = 0  # tokens
    prefix_hits: int = 0  # tokens
    num_preemptions: int = 0
    num_steps: int = 0
    num_tokens_computed: int = 0
    num_chunked_prefills: int = 0  # requests whose prompt took more than one step
    num_wasted_tokens: int = 0  # sampled after a stop that was seen one step late
    max_in_flight: int = 0
    num_late_results: int = 0  # results of rows that were aborted or preempted meanwhile
    num_dropped_events: int = 0  # aborts and results for ids that nobody knows
    num_waiting_tokens: int = 0  # prompt tokens of the requests that wait
    num_expired: int = 0  # requests whose deadline passed
    num_dropped_frames: int = 0  # messages to the engine that were none
    num_held: int = 0  # of those that wait, those whose grammar is not there yet
    num_corrupted: int = 0  # requests whose logits were not finite
    compilations: dict[str, int] = {}  # by COMPILATION_KINDS, since the engine was ready


class EngineOutputs(msgspec.Struct, array_like=True, tag="out", kw_only=True):
    """One step's news for one client: `ids[i]` (uint32) got `tokens[i]` (int32), in order."""

    ids: bytes = b""
    tokens: bytes = b""
    extras: dict[int, RequestExtra] = {}
    stats: SchedulerStats | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.tokens) or len(self.ids) % 4:
            raise ValueError("ids and tokens that do not match")


class UtilityResult(msgspec.Struct, array_like=True, tag="result"):
    """The answer to a UtilityCall; `error` is set instead of `value` when it failed."""

    call_id: int
    value: Any = None
    error: str | None = None


class ModelInfo(msgspec.Struct, kw_only=True):
    """What the engine resolved about its model; the frontend reads no model config by itself."""

    name: str
    architecture: str
    max_model_len: int
    logits_width: int  # token ids are in [0, logits_width)
    eos_token_ids: list[int]
    bos_token_id: int | None
    tokenizer: str  # folder with tokenizer.json, or a .gguf file
    chat_template: str | None
    generation_defaults: dict[str, Any]
    dtype: str
    num_kv_tokens: int  # KV pool size in tokens of one full-attention request
    num_kv_blocks: int
    block_size: int
    weight_bytes: int
    kv_specs: list[AnyKVSpec]  # by layer
    max_num_batched_tokens: int
    fingerprint: str
    cache_config: dict[str, str]  # labels of vllm:cache_config_info
    max_num_seqs: int = 0  # what runs at once
    max_num_queued_reqs: int = 0  # what waits at most; 0 is no limit
    max_num_queued_tokens: int = 0  # the same in prompt tokens
    on_gpu: bool = False
    has_priorities: bool = False  # requests' priorities say who runs first


class EngineReady(msgspec.Struct, array_like=True, tag="ready"):
    """Sent once by the engine when it can serve. `engine` is how many were there before it."""

    model: ModelInfo
    engine: int = 0


class EngineFailed(msgspec.Struct, array_like=True, tag="failed"):
    """No more will come of an engine; `message` is one line for the user. `engine` is the number
    of the one that says so; -1 is somebody else, who means it for good."""

    message: str
    user_error: bool
    engine: int = -1


class EngineLost(msgspec.Struct, array_like=True, tag="lost"):
    """Sent by the supervisor: the engine is gone, and number `engine` starts. `hung` says that it
    did not end by itself."""

    message: str
    engine: int
    hung: bool = False


FromEngine = EngineOutputs | UtilityResult | EngineReady | EngineFailed | EngineLost
