# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Which requests are let in. Trusts nobody: the frontend has checked the same."""

import numpy as np

from llmserve.config.scheduler import SchedulerConfig
from llmserve.core.messages import EngineRequest
from llmserve.core.request import Request
from llmserve.errors import ContextLengthError, OverloadedError, RequestError
from llmserve.kv_cache.manager import KVCacheManager
from llmserve.scheduler.policy import Turns, order_of


class Admission:
    """Checks a message against the limits of model, pool and queue, and makes a Request of it."""

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVCacheManager,
        max_model_len: int,
        logits_width: int,
        eos_token_ids: frozenset[int],
        seed: int,
    ) -> None:
        self.config = config
        self.kv = kv
        self.max_model_len = max_model_len
        self.logits_width = logits_width
        self.eos_token_ids = eos_token_ids
        self.seed = seed
        self.num_admitted = 0
        self.turns = Turns()

    def admit(self, message: EngineRequest, num_waiting: int, num_waiting_tokens: int) -> Request:
        """Raises RequestError for what can never run, OverloadedError where too many wait."""
        self._check_prompt(message)
        message.params.check_token_ids(self.logits_width)
        message.params.check_prompt_logprobs(len(message.prompt) // 4)
        request = Request(message, self.max_model_len, self.eos_token_ids)
        self._check_pool(request)
        self._check_queue(request, num_waiting, num_waiting_tokens)
        num_prompt, total = request.num_prompt_tokens, request.max_total_tokens
        turn = self.turns.take(message.tenant, num_prompt, total - num_prompt)
        policy = self.config.scheduling_policy
        request.order = order_of(policy, message.priority, self.num_admitted, turn)
        seed = message.params.seed
        request.seed = self._seed_of(request) if seed is None else seed
        self.num_admitted += 1
        return request

    def _check_prompt(self, message: EngineRequest) -> None:
        if not message.prompt or len(message.prompt) % 4:
            raise RequestError("prompt must not be empty", param="prompt")
        num_prompt = len(message.prompt) // 4
        if num_prompt >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens; with one to generate, the context of "
                f"{self.max_model_len} tokens holds at most {self.max_model_len - 1}",
                param="prompt",
            )
        # as unsigned ones, negative ids are large
        unsigned = np.frombuffer(message.prompt, np.uint32)
        largest = unsigned.item(unsigned.argmax())  # a third of what `max` takes
        if largest >= self.logits_width:
            prompt = message.prompt_token_ids
            low, high = int(prompt.min()), int(prompt.max())
            raise RequestError(
                f"prompt: token id {low if low < 0 else high} is outside 0 to "
                f"{self.logits_width - 1}",
                param="prompt",
            )
        most = self.config.max_num_batched_tokens
        assert most is not None
        if not self.config.enable_chunked_prefill and num_prompt > most:
            raise RequestError(
                f"the prompt has {num_prompt} tokens; without chunked prefill a step takes at "
                f"most --max-num-batched-tokens {most}",
                param="prompt",
            )

    def _check_pool(self, request: Request) -> None:
        num_prompt, total = request.num_prompt_tokens, request.max_total_tokens
        peak = self.kv.blocks_at_peak(max(total - 1, num_prompt))
        if peak >= self.kv.pool.num_blocks:
            raise ContextLengthError(
                f"{num_prompt} prompt tokens and max_tokens {total - num_prompt} need {peak} KV "
                f"blocks; the whole cache has {self.kv.pool.num_blocks - 1}",
                param="max_tokens",
            )

    def _check_queue(self, request: Request, num_waiting: int, num_waiting_tokens: int) -> None:
        most, tokens = self.config.max_num_queued_reqs, self.config.max_num_queued_tokens
        if most and num_waiting >= most:
            raise OverloadedError(f"{most} requests are waiting already")
        if tokens and num_waiting_tokens + request.num_prompt_tokens > tokens:
            raise OverloadedError(
                f"{num_waiting_tokens} prompt tokens are waiting already; at most {tokens} may"
            )

    def _seed_of(self, request: Request) -> int:
        """For an unseeded request: differs between requests, whatever they are batched with.

        Python hashes integers, other than strings, alike in every process.
        """
        return hash((self.seed, request.key, self.num_admitted)) & (2**63 - 1)
