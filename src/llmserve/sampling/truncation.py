# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""min_p, top_k, top_p: which tokens a draw may take, as one lowest value per row.

With x = logits / temperature, in this order:
    min_p   keeps x >= max(x) + log(min_p)
    top_k   keeps x >= the k-th largest x
    top_p   keeps t where the mass strictly above x[t], among what is kept so far, is below
            top_p of the mass kept so far: the smallest prefix that reaches top_p
Tokens of equal value are kept or dropped together, so the kept set depends on values alone and is
the same on every device and on every path below.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmserve.core.scheduler_output import NewRequest
from llmserve.sampling.base import SamplerContext, to_device

_LOWEST = torch.finfo(torch.float32).min  # -inf is never kept


@dataclass(slots=True)
class Limits:
    """What some rows ask for, on the device, and what the host knows of it."""

    log_min_p: Tensor  # float32 [m, 1], -inf = off
    top_k: Tensor  # int64 [m, 1], logits_width = off
    top_p: Tensor  # float64 [m, 1], 1 = off
    only_top_p: Tensor  # bool [m, 1]
    ordered: bool  # whether a top_k or a top_p is on

    def take(self, index: Tensor | slice) -> "Limits":
        """Those of the rows `index`."""
        return Limits(
            self.log_min_p[index],
            self.top_k[index],
            self.top_p[index],
            self.only_top_p[index],
            self.ordered,
        )


class Truncation:
    """The three parameters of every slot."""

    def __init__(self, context: SamplerContext) -> None:
        self._context = context
        self._log_min_p = np.full(context.num_slots, -math.inf, np.float32)
        self._top_k = np.full(context.num_slots, context.logits_width, np.int64)
        self._top_p = np.ones(context.num_slots, np.float64)
        self.active = np.zeros(context.num_slots, np.bool_)

    def add(self, slot: int, request: NewRequest) -> None:
        """A request enters `slot`."""
        params, width = request.params, self._context.logits_width
        self._log_min_p[slot] = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self._top_k[slot] = params.top_k if 0 < params.top_k < width else width
        self._top_p[slot] = params.top_p
        self.active[slot] = params.min_p > 0 or self._top_k[slot] < width or self._top_p[slot] < 1

    def table(self, temperature: np.ndarray) -> np.ndarray:
        """The `params` of kernels/draw.py, float32 [num_slots, 4]; `temperature` [num_slots]."""
        columns = (temperature, self._log_min_p, self._top_k, self._top_p)
        return np.stack([column.astype(np.float32) for column in columns], 1)

    def limits(self, slots: np.ndarray) -> Limits:
        """For the rows of `slots`."""
        log_min_p, top_k, top_p = self._log_min_p[slots], self._top_k[slots], self._top_p[slots]
        k_on = top_k < self._context.logits_width
        only_top_p = ~k_on & (log_min_p == -math.inf)

        def column(values: np.ndarray) -> Tensor:
            return to_device(values[:, None].copy(), self._context.device)

        return Limits(
            log_min_p=column(log_min_p),
            top_k=column(top_k),
            top_p=column(top_p),
            only_top_p=column(only_top_p),
            ordered=bool(k_on.any() or (top_p < 1).any()),
        )


def prefix_lowest(
    prefix: Tensor, total: Tensor, limits: Limits, *, whole: bool
) -> tuple[Tensor, Tensor]:
    """Lowest kept value [m, 1], from the largest values of each row alone; and where it is sure.

    `prefix` float32 [m, p]: descending; `whole`: there are no others. `total` float64 [m, 1]: the
    whole row's sum of exp(x - max), used where top_p alone is set. A row is sure, bool [m], if its
    lowest kept value lies above the end of its prefix.
    """
    size = prefix.shape[1]
    top, last = prefix[:, :1], prefix[:, -1:]
    kth = prefix.gather(1, limits.top_k.clamp(max=size) - 1)
    lowest = torch.where(limits.top_k <= size, kth, _LOWEST)
    lowest = lowest.maximum(top + limits.log_min_p).clamp_(min=_LOWEST)
    mass = (prefix - top).exp_().masked_fill_(prefix < lowest, 0).cumsum(1, dtype=torch.float64)
    complete = (last < lowest) | whole
    total = torch.where(complete, mass[:, -1:], total)
    border = (mass < limits.top_p * total).sum(1, keepdim=True).clamp_(max=size - 1)
    in_top_p = torch.where(limits.top_p < 1, prefix.gather(1, border), _LOWEST)
    lowest = lowest.maximum(in_top_p)
    sure = (last < lowest) & (complete | limits.only_top_p) | whole
    return lowest, sure.squeeze(1)


def wide_lowest(x: Tensor, limits: Limits) -> Tensor:
    """Lowest kept value [m, 1] of whole rows `x` float32 [m, width]; no branch on its values."""
    if limits.ordered:
        total = torch.ones_like(limits.top_p)  # not read
        return prefix_lowest(x.sort(1, descending=True).values, total, limits, whole=True)[0]
    return (x.amax(1, keepdim=True) + limits.log_min_p).clamp_(min=_LOWEST)
