# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""One token a row: min_p, top_k, top_p and argmax(logit / T + Gumbel), without a sort.

A row is read once by `_scan_kernel`, split over the card. Rows without truncation are drawn in that
pass. For the others it leaves the maximum and the mass of every 64 tokens, from which
`_truncate_kernel` knows which few of these blocks can hold a kept token; it reads those alone to
find the lowest kept value, exactly, and to draw. No grid, allocation or wait depends on values.

What a row draws does not depend on the rows beside it: sums are over fixed blocks in fixed order.
"""

from __future__ import annotations

import functools
import math

import torch

from llmserve.kernels.gumbel import gumbel, gumbel_triton, row_key_triton, row_keys
from llmserve.kernels.triton_jit import loop, next_power_of_2, tl, triton, use_triton

_BLOCK = 64  # tokens a maximum is kept of
_TILE_BLOCKS = 16
_MAX_SPLITS = 256
_WAYS = 8  # candidate thresholds in one pass
_LOWEST = torch.finfo(torch.float32).min  # -inf is never kept

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def draw_rows(
    logits: torch.Tensor,
    slots: torch.Tensor,
    params: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    arrived: torch.Tensor,
    *,
    random: bool,
    truncated: bool,
) -> Drawn:
    """Token ids int64 [n], invalid bool [n], and the lowest kept logit / temperature float32
    [n, 1], -inf = all, or None without `truncated`. A row that holds NaN, +inf or only -inf, or
    overflows when divided, is invalid, and its token 0. Equal scores go to the lowest token id.

    `logits` float32 [n, width], contiguous in a row; `slots`, `output_index` int64 [n]. By slot:
    `params` float32 [num_slots, 4] of temperature (0 = greedy), log(min_p) (-inf = off), top_k
    (width or more = off) and top_p (1 = off); `seeds` int64. `random`: whether any row has a
    temperature, `truncated`: whether one of these has a limit; without `random`, seeds and indices
    are not read. `arrived` int32 [>= n]: zeros, and zeros again afterwards; one stream at a time.
    """
    draw = draw_rows_triton if use_triton(logits) else draw_rows_torch
    return draw(
        logits, slots, params, seeds, output_index, arrived, random=random, truncated=truncated
    )


def draw_rows_torch(
    logits: torch.Tensor,
    slots: torch.Tensor,
    params: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    arrived: torch.Tensor,
    *,
    random: bool,
    truncated: bool,
) -> Drawn:
    """The reference."""
    temperature, log_min_p, top_k, top_p = params[slots][:, :, None].unbind(1)
    greedy = temperature == 0
    x = logits / temperature.masked_fill(greedy, 1)
    score = x.clone()
    if random:
        ids = torch.arange(x.shape[1], device=x.device)
        score += gumbel(row_keys(seeds[slots], output_index)[:, None], ids).masked_fill_(greedy, 0)
    lowest = None
    if truncated:
        ordered = x.sort(1, descending=True).values
        lowest = (ordered[:, :1] + log_min_p).clamp_(min=_LOWEST)
        kth = ordered.gather(1, top_k.long().clamp(max=x.shape[1]) - 1)
        lowest = torch.where(top_k < x.shape[1], lowest.maximum(kth), lowest)
        mass = (ordered - ordered[:, :1]).double().exp().masked_fill_(ordered < lowest, 0).cumsum(1)
        border = (mass < top_p * mass[:, -1:]).sum(1, keepdim=True).clamp_(max=x.shape[1] - 1)
        lowest = torch.where(top_p < 1, lowest.maximum(ordered.gather(1, border)), lowest)
        lowest.masked_fill_(greedy | (log_min_p.isneginf() & (top_k >= x.shape[1]) & (top_p == 1)),
                            -math.inf)  # fmt: skip
        score.masked_fill_(x < lowest, -math.inf)
    invalid = ~score.amax(1).isfinite()
    best = score == score.amax(1, keepdim=True)
    return best.int().argmax(1).masked_fill_(invalid, 0), invalid, lowest


@functools.cache
def _num_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    # About eight are on a multiprocessor at a time: two rounds
    return 16 * torch.cuda.get_device_properties(device).multi_processor_count


def draw_rows_triton(
    logits: torch.Tensor,
    slots: torch.Tensor,
    params: torch.Tensor,
    seeds: torch.Tensor,
    output_index: torch.Tensor,
    arrived: torch.Tensor,
    *,
    random: bool,
    truncated: bool,
) -> Drawn:
    """One launch, with `truncated` two."""
    n, width = logits.shape
    device = logits.device
    token_ids = torch.empty(n, dtype=torch.int64, device=device)
    invalid = torch.empty(n, dtype=torch.bool, device=device)
    lowest = torch.empty(n, 1, device=device) if truncated else None
    if n == 0:
        return token_ids, invalid, lowest
    num_blocks = -(-width // _BLOCK)
    tiles = -(-num_blocks // _TILE_BLOCKS)
    splits = max(1, min(tiles, _num_programs(device) // n, _MAX_SPLITS))
    kept_blocks = num_blocks if truncated else 0
    # Per row 2 x num_blocks maxima and masses; behind all rows' a best score for each split
    values = torch.empty(n * (2 * kept_blocks + splits), device=device)
    ids = torch.empty(n * (kept_blocks + splits), dtype=torch.int32, device=device)
    _scan_kernel[(n, splits)](
        logits, slots, params, seeds, output_index, values, ids, arrived, token_ids, invalid,
        logits.stride(0), width, RANDOM=random, TRUNCATED=truncated, BLOCK=_BLOCK,
        TILE_BLOCKS=_TILE_BLOCKS, MAX_SPLITS=_MAX_SPLITS, num_warps=4,
    )  # fmt: skip
    if truncated:
        _truncate_kernel[(n,)](
            logits, slots, params, seeds, output_index, values, ids, token_ids, invalid, lowest,
            logits.stride(0), width, BLOCK=_BLOCK, TILE_BLOCKS=_TILE_BLOCKS,
            ALL_BLOCKS=next_power_of_2(num_blocks), WAYS=_WAYS, num_warps=8,
        )  # fmt: skip
    return token_ids, invalid, lowest


@triton.jit
def _load(row_logits, token, inside):
    # NaN becomes +inf: either makes the row invalid, and a maximum cannot miss it
    raw = tl.load(row_logits + token, mask=inside, other=float("-inf"))
    return tl.where(raw < float("inf"), raw, float("inf"))


@triton.jit
def _is_truncated(row_params, width):
    log_min_p = tl.load(row_params + 1)
    limited = (log_min_p > float("-inf")) | (tl.load(row_params + 2) < width)
    return (limited | (tl.load(row_params + 3) < 1.0)) & (tl.load(row_params) > 0.0)


@triton.jit
def _store_best(score, token, token_ids, invalid, row):
    best = tl.max(score)
    lowest_id = tl.min(tl.where(score == best, token, 0x7FFFFFFF))
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(token_ids + row, tl.where(finite, lowest_id, 0).to(tl.int64))
    tl.store(invalid + row, finite == 0)


# An argument named `params` would be shadowed inside Triton 3.6's launcher.
@triton.jit
def _scan_kernel(
    logits, slots, all_params, seeds, output_index, values, ids, arrived, token_ids, invalid,
    stride, width, RANDOM: tl.constexpr, TRUNCATED: tl.constexpr, BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    num_blocks = tl.cdiv(width, BLOCK)
    num_tiles = tl.cdiv(num_blocks, TILE_BLOCKS)
    first, last = num_tiles * split // splits, num_tiles * (split + 1) // splits
    slot = tl.load(slots + row)
    temperature = tl.load(all_params + slot * 4)
    random = temperature > 0.0
    truncated = random & (num_blocks < 0)  # false
    if TRUNCATED:
        truncated = _is_truncated(all_params + slot * 4, width)
    row_logits = logits + row * stride
    block = tl.arange(0, TILE_BLOCKS)
    in_tile = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if truncated:
        row_values = values + row * 2 * num_blocks
        for tile in loop(first, last):
            token = tile * (TILE_BLOCKS * BLOCK) + in_tile
            x = tl.div_rn(_load(row_logits, token, token < width), temperature)
            top = tl.max(x, 1)
            finite_top = tl.minimum(tl.maximum(top, -3.4028234663852886e38), 3.4028234663852886e38)
            mass = tl.sum(tl.exp(x - finite_top[:, None]), 1)
            number = tile * TILE_BLOCKS + block
            tl.store(row_values + number, top, mask=number < num_blocks)
            tl.store(row_values + num_blocks + number, mass, mask=number < num_blocks)
    else:
        if RANDOM:
            key = row_key_triton(tl.load(seeds + slot), tl.load(output_index + row))
        best = tl.full([TILE_BLOCKS, BLOCK], float("-inf"), tl.float32)
        best_id = tl.zeros([TILE_BLOCKS, BLOCK], tl.int32)
        for tile in loop(first, last):
            token = tile * (TILE_BLOCKS * BLOCK) + in_tile
            score = _load(row_logits, token, token < width)
            if RANDOM and random:
                score = tl.div_rn(score, temperature) + gumbel_triton(key, token)
            better = score > best
            best = tl.where(better, score, best)
            best_id = tl.where(better, token, best_id)
        top = tl.max(best)
        token = tl.min(tl.where(best == top, best_id, 0x7FFFFFFF))
        base = row * splits
        if TRUNCATED:
            values += num_rows * 2 * num_blocks
            ids += num_rows * num_blocks
        tl.store(values + base + split, top)
        tl.store(ids + base + split, token)
        # The last to arrive sees what all splits of the row have stored
        if tl.atomic_add(arrived + row, 1, sem="acq_rel") == splits - 1:
            other = tl.arange(0, MAX_SPLITS)
            there = other < splits
            top_all = tl.load(
                values + base + other, mask=there, other=float("-inf"), cache_modifier=".cg"
            )
            token_all = tl.load(ids + base + other, mask=there, other=0, cache_modifier=".cg")
            _store_best(top_all, token_all, token_ids, invalid, row)
            tl.store(arrived + row, 0)


@triton.jit
def _order(x):
    # Its own inverse between float32 bits and int32 of the same order
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def _between(low, high, share, turn):
    """`share` of the way from `low`, in turn over values and over the floats there are: the first
    is fast where values are spread evenly, the second bounds the number of turns."""
    low_key = _order(low.to(tl.int32, bitcast=True)).to(tl.int64)
    high_key = _order(high.to(tl.int32, bitcast=True)).to(tl.int64)
    distance = ((high_key - low_key).to(tl.float64) * share).to(tl.int64)
    by_float = _order((low_key + distance).to(tl.int32)).to(tl.float32, bitcast=True)
    by_value = low * (1.0 - share) + high * share
    return tl.where((turn % 2 == 0) & (high < float("inf")), by_value, by_float)


@triton.jit
def _above(x):
    return x + (tl.abs(x) * 1e-6 + 1e-30)


@triton.jit
def _floor(maxima, weight, target, low, top):
    """A value that the weight of the blocks whose maximum reaches it proves to be kept: at least
    `target`. `low` if nothing is proven; else few blocks more than need be have a maximum above.
    """
    if tl.sum(tl.where(maxima >= low, weight, 0.0)) >= target:
        low = tl.maximum(low, tl.min(tl.where(maxima >= low, maxima, float("inf"))))
        high = _above(top)
        turn = 0
        count, above = tl.sum((maxima >= low).to(tl.int32)), 0
        # Any value is as true as the best: ties need no more turns
        while (count - above > 8 + above // 8) & (high > _above(low)) & (turn < 32):
            middle = _between(low, high, 0.5, turn)
            reaches = maxima >= middle
            enough = tl.sum(tl.where(reaches, weight, 0.0)) >= target
            reaching = tl.sum(reaches.to(tl.int32))
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
            count, above = tl.where(enough, reaching, count), tl.where(enough, above, reaching)
            turn += 1
    return low


@triton.jit
def _tile(row_logits, blocks, count, tile, width, temperature,
          BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr):  # fmt: skip
    at = tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    block = tl.load(blocks + at, mask=at < count, other=0)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (at < count)[:, None] & (token < width)
    return token, tl.div_rn(_load(row_logits, token, inside), temperature)


@triton.jit
def _search(
    row_logits, blocks, count, width, temperature, top, start, target, share,
    MASS: tl.constexpr, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """The largest element that the weight of what is not below it brings to `target`: their number,
    or with MASS the sum of exp(x - top). A target of 0 is `share` of the weight from `start` on.
    `start` itself if that weight is less.
    """
    low, high = start, _above(top)
    if MASS:
        low = tl.maximum(low, top - 104.0)  # below, exp is 0
    way = tl.arange(0, WAYS)
    result, turn, searching = start, 0, 1
    while (searching == 1) & (turn < 80):
        # [low, high) holds the result; the first candidate is `low`
        candidates = _between(low, high, way.to(tl.float32) / WAYS, turn)
        weights = tl.zeros([TILE_BLOCKS, BLOCK, WAYS], tl.float32)
        smallest = tl.full([TILE_BLOCKS, BLOCK], float("inf"), tl.float32)
        largest = tl.full([TILE_BLOCKS, BLOCK], float("-inf"), tl.float32)
        for tile in loop(0, tl.cdiv(count, TILE_BLOCKS)):
            _, x = _tile(row_logits, blocks, count, tile, width, temperature, BLOCK, TILE_BLOCKS)
            weight = tl.full([TILE_BLOCKS, BLOCK], 1.0, tl.float32)
            if MASS:
                weight = tl.exp(x - top)
            reaches = x[:, :, None] >= candidates[None, None, :]
            weights += tl.where(reaches, weight[:, :, None], 0.0)
            smallest = tl.minimum(smallest, tl.where(x >= low, x, float("inf")))
            largest = tl.maximum(largest, tl.where(x < high, x, float("-inf")))
        total = tl.sum(tl.sum(weights, 0), 0)
        if target == 0.0:
            target = tl.maximum(share * tl.max(total), 1e-30)
        enough = total >= target
        if tl.max(total) < target:
            searching = 0
        elif tl.min(smallest) >= tl.max(largest):
            result, searching = tl.min(smallest), 0
        else:
            low_before, high_before = low, high
            low = tl.max(tl.where(enough, candidates, low_before))
            high = tl.min(tl.where(enough, high_before, candidates))
            # Only elements matter: what lies below the smallest is no distance to search
            low = tl.maximum(low, tl.min(smallest))
        turn += 1
    return result


@triton.jit
def _truncate_kernel(
    logits, slots, all_params, seeds, output_index, values, ids, token_ids, invalid, lowest,
    stride, width, BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr, ALL_BLOCKS: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(width, BLOCK)
    slot = tl.load(slots + row)
    row_params = all_params + slot * 4
    if _is_truncated(row_params, width):
        temperature, log_min_p = tl.load(row_params), tl.load(row_params + 1)
        top_k, top_p = tl.load(row_params + 2), tl.load(row_params + 3)
        number = tl.arange(0, ALL_BLOCKS)
        row_values = values + row * 2 * num_blocks
        maxima = tl.load(row_values + number, mask=number < num_blocks, other=float("-inf"))
        top = tl.max(maxima)
        if (top > float("-inf")) & (top < float("inf")):
            masses = tl.load(row_values + num_blocks + number, mask=number < num_blocks, other=0.0)
            by_k, by_p = top_k < width, top_p < 1.0
            peak = tl.exp(maxima - top)
            mass = tl.maximum(top_p * tl.sum(masses * peak), 1e-30)
            only_p = by_p & (by_k == 0) & (log_min_p == float("-inf"))
            low = tl.maximum(top + log_min_p, -3.4028234663852886e38)
            target = tl.where(by_k, top_k, tl.where(only_p, mass, float("inf")))
            low = _floor(maxima, tl.where(by_k, 1.0, peak), target, low, top)
            chosen = (maxima >= low).to(tl.int32)
            blocks = ids + row * num_blocks
            tl.store(blocks + tl.cumsum(chosen, 0) - 1, number, mask=chosen == 1)
            count = tl.sum(chosen)
            tl.debug_barrier()
            row_logits = logits + row * stride
            if by_k:
                low = _search(
                    row_logits, blocks, count, width, temperature, top, low, top_k, 0.0,
                    False, BLOCK, TILE_BLOCKS, WAYS,
                )  # fmt: skip
            if by_p:
                low = _search(
                    row_logits, blocks, count, width, temperature, top, low,
                    tl.where(only_p, mass, 0.0), top_p, True, BLOCK, TILE_BLOCKS, WAYS,
                )  # fmt: skip
            key = row_key_triton(tl.load(seeds + slot), tl.load(output_index + row))
            best = tl.full([TILE_BLOCKS, BLOCK], float("-inf"), tl.float32)
            best_id = tl.zeros([TILE_BLOCKS, BLOCK], tl.int32)
            for tile in loop(0, tl.cdiv(count, TILE_BLOCKS)):
                token, x = _tile(
                    row_logits, blocks, count, tile, width, temperature, BLOCK, TILE_BLOCKS
                )
                if tl.max(x) >= low:
                    score = tl.where(x >= low, x + gumbel_triton(key, token), float("-inf"))
                    better = score > best
                    best = tl.where(better, score, best)
                    best_id = tl.where(better, token, best_id)
            _store_best(best, best_id, token_ids, invalid, row)
            tl.store(lowest + row, low)
        else:
            tl.store(token_ids + row, tl.zeros([], tl.int64))
            tl.store(invalid + row, top == top)
            tl.store(lowest + row, -3.4028234663852886e38)
    else:
        tl.store(lowest + row, float("-inf"))
