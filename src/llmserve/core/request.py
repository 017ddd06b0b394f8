# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A request as the scheduler sees it while it does not run; slots hold the rest while it does."""

import numpy as np

from llmserve.core.messages import EngineRequest, FinishReason
from llmserve.core.sampling_params import SamplingParams


class Request:
    """Tokens, progress and results. Changed by the scheduler alone.

    `key` is unique in the engine: `client << 32 | wire id`. `tokens` are int32 ids as bytes: all
    known ones while the request waits, those of filled blocks while it runs. `num_in_flight` counts
    steps in flight which carry a row of it although it no longer has its slot.
    """

    __slots__ = (
        "arrival", "block_hashes", "cache_salt", "client", "deadline", "finish_reason", "key",
        "max_total_tokens", "num_blocks_wanted", "num_cached_tokens", "num_in_flight",
        "num_preemptions", "num_prompt_tokens", "order", "params", "prompt_logprobs_done",
        "queue_time", "seed", "slot", "stop_token_ids", "tenant", "told_start", "tokens",
        "waits_for", "wire_id",
    )  # fmt: skip

    def __init__(
        self,
        message: EngineRequest,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        seed: int = 0,
        order: tuple[int, ...] = (0, 0),
    ) -> None:
        params = message.params
        self.client = message.client
        self.wire_id = message.request_id
        self.key = message.client << 32 | message.request_id
        self.params: SamplingParams = params
        self.arrival = message.arrival
        self.deadline = message.deadline
        self.tenant = message.tenant
        self.cache_salt = message.cache_salt
        self.seed = seed
        self.order = order  # smaller runs first
        self.tokens = bytearray(message.prompt)
        self.num_prompt_tokens = len(self.tokens) // 4
        room = max_model_len - self.num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        self.max_total_tokens = self.num_prompt_tokens + max_tokens
        self.num_cached_tokens = -1  # -1: never scheduled
        self.num_in_flight = 0
        self.num_preemptions = 0
        self.prompt_logprobs_done = 0  # prompt positions after the first already reported
        self.queue_time: float | None = None
        self.told_start = False  # whether num_cached_tokens and queue_time went out
        self.slot = 0  # 0: it waits
        self.finish_reason: FinishReason | None = None
        self.block_hashes: list[bytes] = []
        self.waits_for: bytes | None = None  # hash of a block that another request computes
        self.num_blocks_wanted = 0  # what the last attempt to run it lacked
        self.stop_token_ids = (
            frozenset(params.stop_token_ids)
            if params.ignore_eos
            else eos_token_ids.union(params.stop_token_ids)
            if params.stop_token_ids
            else eos_token_ids
        )

    @property
    def max_output_tokens(self) -> int:
        """That may be generated."""
        return self.max_total_tokens - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known tokens; while the request runs, only those of filled blocks."""
        return len(self.tokens) // 4

    @property
    def token_ids(self) -> np.ndarray:
        """int32 [num_tokens], a copy."""
        return np.frombuffer(bytes(self.tokens), np.int32)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be reported."""
        return (
            self.params.prompt_logprobs is not None
            and self.prompt_logprobs_done < self.num_prompt_tokens - 1
        )
