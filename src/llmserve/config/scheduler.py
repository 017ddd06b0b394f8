# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What may run in one step."""

from dataclasses import dataclass

from llmserve.config.flag import check_all, flag, not_negative, positive, size, up_to


@dataclass(frozen=True)
class SchedulerConfig:
    """Budgets and order."""

    max_num_seqs: int | None = flag(
        None, "Most requests in one step, at most 65536.", check=up_to(65536), parse=size
    )
    max_num_batched_tokens: int | None = flag(
        None, "Most tokens in one step.", check=positive, parse=size
    )
    enable_chunked_prefill: bool = flag(
        True, "Split prompts over steps; off: a prompt runs whole or waits."
    )
    long_prefill_token_threshold: int = flag(
        0, "Most tokens of one prompt in a step; 0 is no limit.", check=not_negative, parse=size
    )
    max_inter_token_ms: float | None = flag(
        None,
        "Longest step while requests decode: prompts are split to fit. Default: 2.4 times what the "
        "decodes alone take, or more where prompts would hardly get on; 0 is no limit.",
        check=not_negative,
    )
    scheduling_policy: str = flag(
        "fcfs",
        "Order of requests: arrival, or the request's priority: low first, clients have 0 at best.",
        choices=("fcfs", "priority"),
    )
    async_scheduling: bool = flag(True, "Plan a step while the one before still runs.")
    max_num_queued_reqs: int = flag(
        4096, "Waiting requests before 503; 0 is no limit.", check=not_negative, parse=size
    )
    max_num_queued_tokens: int = flag(
        8 << 20, "Waiting prompt tokens before 503; 0 is no limit.", check=not_negative, parse=size
    )

    def __post_init__(self) -> None:
        check_all(self)
