# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The draw on a CPU: argmax of logit / temperature + Gumbel noise over the kept tokens.

The paths take the same token, because noise and kept set know nothing of the path:
    wide     noise for every token; without truncation
    prefix   with truncation: noise for the largest 64, 1,024 or 8,192 values, where these hold all
             kept tokens; else wide, with a sort
    whole    a prefix of a vocabulary no larger than that
    kernel   a GPU's: kernels/draw.py
Equal scores go to the lowest token id.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmserve.kernels.gumbel import gumbel
from llmserve.sampling.truncation import Limits, prefix_lowest, wide_lowest

_PREFIXES = (64, 1024, 8192)
_CHUNK = 1 << 16  # tokens x rows whose noise is made at a time, 8 bytes each: fits the cache


class Draw(NamedTuple):
    """`score` is not finite where nothing was left to draw; `lowest` is the lowest kept value."""

    token_ids: Tensor  # int64 [m]
    score: Tensor  # float32 [m]
    lowest: Tensor  # float32 [m, 1], in units of logits / temperature; -inf = all


def draw(logits: Tensor, temperature: Tensor, keys: Tensor, limits: Limits | None) -> Draw:
    """One token for each row of `logits` float32 [m, width].

    `temperature` float32 [m, 1] > 0; `keys` int64 [m] of `gumbel.row_keys`; `limits` None: all
    tokens are kept.
    """
    if limits is None:
        return draw_wide(logits, temperature, keys, limits)
    return _draw_prefix(logits, temperature, keys, limits, _PREFIXES)


def draw_wide(logits: Tensor, temperature: Tensor, keys: Tensor, limits: Limits | None) -> Draw:
    """`draw` by way of whole rows."""
    num_rows, width = logits.shape
    ids = torch.arange(width, device=logits.device)
    chunk = max(1, _CHUNK // width)
    parts = []
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        x = logits[rows] / temperature[rows]
        score = gumbel(keys[rows, None], ids).add_(x)
        if limits is None:
            lowest = torch.full_like(temperature[rows], -math.inf)
        else:
            lowest = wide_lowest(x, limits if chunk >= num_rows else limits.take(rows))
            score.masked_fill_(x < lowest, -math.inf)
        best = score.max(1)
        parts.append((best.indices, best.values, lowest))
    return Draw(*parts[0]) if len(parts) == 1 else Draw(*map(torch.cat, zip(*parts, strict=True)))


def _draw_prefix(
    logits: Tensor, temperature: Tensor, keys: Tensor, limits: Limits, sizes: tuple[int, ...]
) -> Draw:
    if not sizes:
        return draw_wide(logits, temperature, keys, limits)
    width = logits.shape[1]
    size = min(sizes[0], width)
    largest = logits.topk(size, dim=1)
    x = largest.values / temperature
    total = torch.ones_like(limits.top_p)
    if size < width and bool(limits.only_top_p.any()):
        # A row's softmax does not depend on the batch, as a row's sum over many would
        total = 1 / (logits / temperature).softmax(1).amax(1, keepdim=True).double()
    lowest, sure = prefix_lowest(x, total, limits, whole=size == width)
    score = gumbel(keys[:, None], largest.indices).add_(x).masked_fill_(x < lowest, -math.inf)
    best = score.amax(1, keepdim=True)
    token_ids = torch.where(score == best, largest.indices, width).amin(1)
    if not bool(sure.all()):
        rest = (~sure).nonzero().squeeze(1)
        wider = _draw_prefix(
            logits[rest], temperature[rest], keys[rest], limits.take(rest), sizes[1:]
        )
        token_ids[rest], best[rest, 0], lowest[rest] = wider
    return Draw(token_ids, best.squeeze(1), lowest)
