# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Attention over the paged KV cache: split-KV decode, and prefill of rows of any length.

Lengths are read on the device, so no launch depends on them; grids depend on the numbers of rows
and tokens alone and can be captured in a graph. Where these are bounds, a fixed number of programs
takes the tiles that there are by turns. The keys of few tiles are split. The torch reference is
attention/torch_sdpa.py.
"""

from __future__ import annotations

import torch

from llmserve.kernels.triton_jit import card_of, loop, next_power_of_2, pdl_of, tl, triton

SHARED_MEMORY_LIMIT = 101_376  # bytes a block may use on compute capability 12.x
_MAX_SPLITS = 32
_LEAST_TILES = 4  # of keys in a part of a prompt's tile
_JOINED, _JOINING = 4, 8  # lines of a tile at once; programs a multiprocessor


def num_splits(num_rows: int, num_kv_heads: int, max_keys: int, num_sms: int) -> int:
    """Splits of a decode row's keys: about two programs a multiprocessor, each of 64 keys or more.
    A power of two; depends on nothing but the launch's fixed sizes.
    """
    wanted = -(-2 * num_sms // (num_rows * num_kv_heads))
    most = min(max(max_keys // 64, 1), _MAX_SPLITS)
    return min(next_power_of_2(wanted), 1 << (most.bit_length() - 1))


def tile_sizes(head_dim: int, element_size: int, decode: bool) -> tuple[int, int, int, int]:
    """(queries times heads, keys, stages, warps) of a tile. With every head_dim within what a block
    may use: on compute capability 9 the queries of prompts are kept there too."""
    row_bytes = next_power_of_2(head_dim) * element_size
    if decode:
        return 16, 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16, 2, 4
    if row_bytes <= 256:
        return (128, 64, 3, 8) if element_size == 2 else (64, 64, 2, 4)
    if row_bytes <= 512:
        return 64, 32, 1, 4
    return 32, 16, 1, 4


class Scratch:
    """What splits of the same keys leave for each other: `partial` float32 [..., head_dim],
    `partial_lse` float32 [...] and `arrived` int32, which is zeros, and zeros again afterwards.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        card = card_of(device)
        self.num_sms = card.multiprocessors if card else 4
        self.partial = self.partial_lse = torch.empty(0, device=device)
        self.arrived = torch.zeros(0, dtype=torch.int32, device=device)

    def _allocate(self, size: tuple[int, ...], head_dim: int, counters: int) -> None:
        self.partial = torch.empty(*size, head_dim, dtype=torch.float32, device=self.device)
        self.partial_lse = torch.empty(size, dtype=torch.float32, device=self.device)
        if len(self.arrived) < counters:
            self.arrived = torch.zeros(counters, dtype=torch.int32, device=self.device)


class DecodeScratch(Scratch):
    """Of decode rows whose number is known; [num_rows, num_kv_heads, splits, group]."""

    def fit(
        self, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, max_keys: int
    ) -> None:
        """Sizes it for rows of up to `max_keys` keys."""
        splits = num_splits(num_rows, num_kv_heads, max_keys, self.num_sms)
        size = (num_rows, num_kv_heads, splits, num_heads // num_kv_heads)
        self._allocate(size, head_dim, num_rows * num_kv_heads)


class TileScratch(Scratch):
    """Of tiles that the device counts; [parts, queries times heads]. Prompts have `programs`, eight
    warps a multiprocessor, with up to two parts each; decode rows two programs a multiprocessor."""

    def __init__(self, device: torch.device, group: int, head_dim: int, element_size: int) -> None:
        super().__init__(device)
        tile_q, _, _, warps = tile_sizes(head_dim, element_size, False)
        self.programs = self.num_sms * 8 // warps
        tile_q = max(tile_q, next_power_of_2(group))
        self._allocate((2 * self.programs, tile_q), head_dim, 2 * self.num_sms)


def paged_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scratch: Scratch,
    row_counts: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """`query`, `out` [num_rows, num_heads, head_dim], one token a row, `out` contiguous; `kv_cache`
    [num_blocks, 2, num_kv_heads, block_size, head_dim]; `block_table` int32 [num_rows, max_blocks];
    `seq_lens` int32 [num_rows], 0 for a padding row (its output is zeros); `scratch` fits.
    With `row_counts` int32 [2] only its first number of rows is computed; `scratch` is TileScratch.
    """
    num_rows, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    partial, partial_lse, arrived = scratch.partial, scratch.partial_lse, scratch.arrived
    group = num_heads // num_kv_heads
    if row_counts is None:
        splits = partial.shape[2]
        grid: tuple[int, ...] = num_rows, num_kv_heads, splits
    else:
        splits = _MAX_SPLITS
        programs = 2 * scratch.num_sms
        grid = (max(programs, min(num_rows * num_kv_heads, 2 * programs)),)
    tile_q, tile_k, stages, warps = tile_sizes(head_dim, query.element_size(), True)
    _decode_kernel[grid](
        query, kv_cache, block_table, seq_lens, out, partial, partial_lse, arrived,
        arrived if row_counts is None else row_counts,
        query.stride(0), query.stride(1), block_table.stride(0), scale, softcap or 0.0,
        HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLITS=splits,
        PROGRAMS=0 if row_counts is None else programs,
        TILE_Q=max(tile_q, next_power_of_2(group)), TILE_K=tile_k, TILE_D=next_power_of_2(head_dim),
        WINDOW=window or 0, SOFTCAP=softcap is not None, **pdl_of(query),
        num_stages=stages, num_warps=warps,
    )  # fmt: skip


def paged_prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scratch: TileScratch,
    first_row: int,
    row_counts: torch.Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Rows from `first_row` on, those before it of one token, of `query`, `out` [num_tokens,
    num_heads, head_dim]; `query_start` int32 [num_rows + 1]; the rest as in `paged_decode`. With
    `row_counts` int32 [2] the rows are those from its first number on, up to its second.
    """
    num_tokens, num_heads, head_dim = query.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    num_rows, group = len(seq_lens) - first_row, num_heads // num_kv_heads
    tile_q, tile_k, stages, warps = tile_sizes(head_dim, query.element_size(), False)
    tile_q = max(tile_q, next_power_of_2(group))
    # With so many tokens, in as few tiles as possible, more parts leave no fewer programs idle
    least_tiles = (num_tokens - first_row) * num_kv_heads // (tile_q // group)
    whole = 3 * least_tiles > 2 * scratch.programs
    counts = first_row, num_rows, seq_lens if row_counts is None else row_counts
    constants = {
        "HEADS": num_kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "TILE_Q": tile_q,
        "TILE_K": tile_k, "TILE_D": next_power_of_2(head_dim), "PROGRAMS": scratch.programs,
        "LEAST_TILES": _LEAST_TILES, "WINDOW": window or 0, "COUNTED": row_counts is not None,
        **pdl_of(query),
    }  # fmt: skip
    _prefill_kernel[(scratch.programs,)](
        query, kv_cache, block_table, query_start, seq_lens, out, scratch.partial,
        scratch.partial_lse, query.stride(0), query.stride(1), out.stride(0), out.stride(1),
        block_table.stride(0), *counts, 1 if whole else _MAX_SPLITS, scale, softcap or 0.0,
        BLOCK_SIZE=block_size, SOFTCAP=softcap is not None, num_stages=stages, num_warps=warps,
        **constants,
    )  # fmt: skip
    if not whole:
        _join_kernel[(_JOINING * scratch.num_sms,)](
            query_start, seq_lens, out, scratch.partial, scratch.partial_lse, out.stride(0),
            out.stride(1), *counts, SPLITS=_MAX_SPLITS, JOINED=_JOINED, **constants,
        )  # fmt: skip


@triton.jit
def _attend_tile(
    q, side_base, tile, block, limit, low, query_pos, acc, row_max, row_sum,
    scale, softcap, HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax, in powers of two, over the keys of a tile that lies in `block`s; MASKED: over
    those that lie in [low, limit) and are seen, else all are."""
    side: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    key_pos = tile * TILE_K + tl.arange(0, TILE_K)
    dims = tl.arange(0, TILE_D)
    within = (tl.arange(0, TILE_K) if TILE_K % BLOCK_SIZE == 0 else key_pos) % BLOCK_SIZE
    rows = block.to(tl.int64) * (2 * HEADS * side) + within * HEAD_DIM
    at = side_base + rows[:, None] + dims[None, :]
    if MASKED:
        written = (key_pos >= low) & (key_pos < limit)
        inside = written[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(at, mask=inside, other=0.0)
        v = tl.load(at + HEADS * side, mask=inside, other=0.0)
    elif TILE_D == HEAD_DIM:
        k = tl.load(at)
        v = tl.load(at + HEADS * side)
    else:
        inside = (dims < HEAD_DIM)[None, :]
        k = tl.load(at, mask=inside, other=0.0)
        v = tl.load(at + HEADS * side, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    factor = scale * 1.4426950408889634
    if SOFTCAP:
        scores = 2.0 * tl.sigmoid(2.0 * scale / softcap * scores) - 1.0
        factor = softcap * 1.4426950408889634
    if MASKED:
        seen = written[None, :] & (key_pos[None, :] <= query_pos[:, None])
        if WINDOW > 0:
            seen = seen & (key_pos[None, :] > query_pos[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * factor)
    finite_max = new_max
    if MASKED:
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * factor - finite_max[:, None])
    decay = tl.exp2(row_max - finite_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _num_splits(tiles, PROGRAMS: tl.constexpr, SPLITS: tl.constexpr):
    """Of each of so many tiles."""
    return tl.minimum(tl.maximum(PROGRAMS // tl.maximum(tiles, 1), 1), SPLITS)


@triton.jit
def _decode_kernel(
    query, kv_cache, block_table, seq_lens, out, partial, partial_lse, arrived, row_counts,
    query_stride_t, query_stride_h, table_stride, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, PROGRAMS: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row, one of HEADS KV heads, a split of the keys. With PROGRAMS it takes others
    by turns, of as many rows as there are, whose keys are split for so many programs."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if PROGRAMS > 0:
        rows = tl.load(row_counts)
        splits = _num_splits(rows * HEADS, PROGRAMS, SPLITS)
        for unit in loop(tl.program_id(0), rows * HEADS * splits, tl.num_programs(0)):
            _decode_part(
                query, kv_cache, block_table, seq_lens, out, partial, partial_lse, arrived,
                query_stride_t, query_stride_h, table_stride, scale, softcap,
                (unit % rows).to(tl.int64), (unit // rows % HEADS).to(tl.int64),
                unit // rows // HEADS, splits,
                HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, SPLITS, TILE_Q, TILE_K, TILE_D, WINDOW, SOFTCAP,
            )  # fmt: skip
    else:
        _decode_part(
            query, kv_cache, block_table, seq_lens, out, partial, partial_lse, arrived,
            query_stride_t, query_stride_h, table_stride, scale, softcap,
            tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64),
            tl.program_id(2), SPLITS,
            HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, SPLITS, TILE_Q, TILE_K, TILE_D, WINDOW, SOFTCAP,
        )  # fmt: skip


@triton.jit
def _decode_part(
    query, kv_cache, block_table, seq_lens, out, partial, partial_lse, arrived,
    query_stride_t, query_stride_h, table_stride, scale, softcap,
    row, kv_head, split, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A row, a KV head with its group of query heads, one of `splits` (up to SPLITS) of the keys.
    The last one to arrive joins them, each weighted by its share of the softmax."""
    heads = tl.arange(0, TILE_Q)
    dims = tl.arange(0, TILE_D)
    keys = tl.arange(0, TILE_K)
    head = kv_head * GROUP + heads
    mine = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    length = tl.load(seq_lens + row)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    first_tile = low // TILE_K
    tiles = tl.cdiv(length, TILE_K) - first_tile
    per_split = tl.maximum(tl.cdiv(tiles, splits), 1)
    active = tl.cdiv(tiles, per_split)
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, first_tile + tiles)
    out_row = out + (row * HEADS + kv_head) * GROUP * HEAD_DIM
    if (begin < end) | (split == 0):  # a row of length 0 is split 0's
        q = tl.load(
            query + row * query_stride_t + head[:, None] * query_stride_h + dims[None, :],
            mask=mine, other=0.0,
        )  # fmt: skip
        acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
        row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
        row_sum = tl.zeros([TILE_Q], tl.float32)
        side = BLOCK_SIZE * HEAD_DIM
        base = kv_cache + kv_head * side
        table_row = block_table + row * table_stride
        at = begin * TILE_K + keys
        block = tl.load(table_row + at // BLOCK_SIZE, mask=at < length, other=0)
        for tile in loop(begin, end):
            at = tile * TILE_K + keys
            # A tile ahead, so that no load of keys waits for one of addresses
            ahead = at + TILE_K
            next_block = tl.load(table_row + ahead // BLOCK_SIZE, mask=ahead < length, other=0)
            seen = at < length
            if WINDOW > 0:
                seen = seen & (at >= low)
            keys_at = block.to(tl.int64) * 2 * HEADS * side + (at % BLOCK_SIZE) * HEAD_DIM
            inside = seen[:, None] & (dims < HEAD_DIM)[None, :]
            k_at = base + keys_at[:, None] + dims[None, :]
            k = tl.load(k_at, mask=inside, other=0.0)
            v = tl.load(k_at + HEADS * side, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if SOFTCAP:
                scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
            scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_max[:, None])
            decay = tl.exp2(row_max - new_max)
            row_sum = row_sum * decay + tl.sum(weights, axis=1)
            acc = acc * decay[:, None]
            acc = acc + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            row_max = new_max
            block = next_block
        result = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        if active <= 1:
            to = out_row + heads[:, None] * HEAD_DIM + dims[None, :]
            tl.store(to, result.to(out.dtype.element_ty), mask=mine)
        else:
            base_at = (row * HEADS + kv_head) * splits
            part_at = (base_at + split) * GROUP + heads
            tl.store(partial_lse + part_at, row_max + tl.log2(row_sum), mask=heads < GROUP)
            tl.store(partial + part_at[:, None] * HEAD_DIM + dims[None, :], result, mask=mine)
            tl.debug_barrier()
            counter = arrived + row * HEADS + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == active - 1:
                others = tl.arange(0, SPLITS)
                there = others < active
                for g in tl.static_range(GROUP):
                    from_at = (base_at + others) * GROUP + g
                    lse = tl.load(
                        partial_lse + from_at, mask=there, other=float("-inf"),
                        cache_modifier=".cg",
                    )  # fmt: skip
                    part = tl.load(
                        partial + from_at[:, None] * HEAD_DIM + dims[None, :],
                        mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0,
                        cache_modifier=".cg",
                    )  # fmt: skip
                    share = tl.exp2(lse - tl.max(lse, axis=0))
                    mean = tl.sum(part * share[:, None], axis=0) / tl.sum(share, axis=0)
                    tl.store(
                        out_row + g * HEAD_DIM + dims, mean.to(out.dtype.element_ty),
                        mask=dims < HEAD_DIM,
                    )  # fmt: skip
                tl.store(counter, 0)


@triton.jit
def _tiles_of(
    query_start, row_counts, first_row, num_rows, most_splits, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, PROGRAMS: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """(first row, rows, tiles a head, parts of each): one part a program, or two where that leaves
    fewer of them idle."""
    if COUNTED:
        first_row = tl.load(row_counts)
        num_rows = tl.load(row_counts + 1) - first_row
    tokens = tl.load(query_start + first_row + num_rows) - first_row
    tiles = (tokens + num_rows * (QUERIES - 1)) // QUERIES
    one = PROGRAMS // tl.maximum(tiles * HEADS, 1)
    two = 2 * PROGRAMS // tl.maximum(tiles * HEADS, 1)
    splits = tl.maximum(tl.where(two > 2 * one, two, one), 1)
    return first_row, num_rows, tiles, tl.minimum(splits, most_splits)


@triton.jit
def _tile_row(query_start, first_row, num_rows, tile, QUERIES: tl.constexpr):
    """(row, its first token, its tokens, the tile's number in it)."""
    left = 0
    right = num_rows
    while right - left > 1:
        middle = (left + right) // 2
        start = tl.load(query_start + first_row + middle) - first_row
        if (start + middle * (QUERIES - 1)) // QUERIES <= tile:
            left = middle
        else:
            right = middle
    row = (first_row + left).to(tl.int64)
    start = tl.load(query_start + row)
    number = tile - (start - first_row + left * (QUERIES - 1)) // QUERIES
    return row, start, tl.load(query_start + row + 1) - start, number


@triton.jit
def _tile_keys(
    length, query_len, number, splits, QUERIES: tl.constexpr, TILE_K: tl.constexpr,
    LEAST_TILES: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Which keys a tile needs: (first position, end, tiles of them in a part, parts)."""
    first = length - query_len + number * QUERIES
    limit = tl.minimum(length, first + QUERIES)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(first - WINDOW + 1, 0)
    key_tiles = tl.cdiv(limit, TILE_K) - low // TILE_K
    per_split = tl.maximum(tl.cdiv(key_tiles, splits), LEAST_TILES)
    return low, limit, per_split, tl.cdiv(key_tiles, per_split)


@triton.jit(do_not_specialize=["first_row", "num_rows", "most_splits"])
def _prefill_kernel(
    query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse,
    query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
    first_row, num_rows, row_counts, most_splits, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr, LEAST_TILES: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program takes by turns: as many queries of one row as fill TILE_Q with the GROUP heads
    that share one of HEADS KV heads, and a part of their keys. Row r's tiles of Q queries start at
    number (its first token + r * (Q - 1)) // Q, which leaves each row at least the tiles that it
    needs, and a single one no more. The last tiles, which have most keys, come first for one head
    and last for the next, so that no program has the longest of each.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    first_row, num_rows, tiles, splits = _tiles_of(
        query_start, row_counts, first_row, num_rows, most_splits, HEADS, TILE_Q // GROUP, PROGRAMS,
        COUNTED,
    )  # fmt: skip
    for unit in loop(tl.program_id(0), tiles * HEADS * splits, tl.num_programs(0)):
        _prefill_part(
            query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse,
            query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
            first_row, num_rows, scale, softcap,
            tl.where(unit // tiles % 2 == 0, tiles - 1 - unit % tiles, unit % tiles),
            (unit // tiles % HEADS).to(tl.int64), unit // tiles // HEADS, splits,
            HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, LEAST_TILES, TILE_Q, TILE_K, TILE_D, WINDOW,
            SOFTCAP,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _prefill_part(
    query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse,
    query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
    first_row, num_rows, scale, softcap, tile, kv_head, split, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LEAST_TILES: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile, a KV head, one of `splits` parts of the keys, if there are LEAST_TILES tiles of keys
    for each. `_join_kernel` joins the parts."""
    QUERIES: tl.constexpr = TILE_Q // GROUP
    row, row_start, query_len, number = _tile_row(query_start, first_row, num_rows, tile, QUERIES)
    if number * QUERIES < query_len:
        length = tl.load(seq_lens + row)
        low, limit, per_split, active = _tile_keys(
            length, query_len, number, splits, QUERIES, TILE_K, LEAST_TILES, WINDOW
        )
        if split < active:
            lines = tl.arange(0, TILE_Q)
            offsets = number * QUERIES + lines // GROUP
            dims = tl.arange(0, TILE_D)
            mine = (offsets < query_len) & (lines < QUERIES * GROUP)
            mine = mine[:, None] & (dims < HEAD_DIM)[None, :]
            token = (row_start + offsets).to(tl.int64)
            head = kv_head * GROUP + lines % GROUP
            q = tl.load(
                query + (token * query_stride_t + head * query_stride_h)[:, None] + dims[None, :],
                mask=mine, other=0.0,
            )  # fmt: skip
            query_pos = length - query_len + offsets
            begin = low // TILE_K + split * per_split
            end = tl.minimum(begin + per_split, tl.cdiv(limit, TILE_K))
            # Of all keys in tiles [whole, bound) every query sees each
            bound = tl.minimum((length - query_len + number * QUERIES + 1) // TILE_K, end)
            whole = begin
            if WINDOW > 0:
                whole = tl.maximum(tl.cdiv(limit - WINDOW, TILE_K), begin)
            bound = tl.maximum(bound, whole)
            acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
            row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
            row_sum = tl.zeros([TILE_Q], tl.float32)
            base = kv_cache + kv_head * BLOCK_SIZE * HEAD_DIM
            table_row = block_table + row * table_stride
            keys = tl.arange(0, TILE_K)
            block = tl.load(
                table_row + (whole * TILE_K + keys) // BLOCK_SIZE, mask=whole < bound, other=0
            )
            for key_tile in loop(whole, bound):
                # A tile ahead, so that no load of keys waits for one of addresses
                ahead = (key_tile + 1) * TILE_K + keys
                next_block = tl.load(table_row + ahead // BLOCK_SIZE, mask=ahead < limit, other=0)
                acc, row_max, row_sum = _attend_tile(
                    q, base, key_tile, block, limit, low, query_pos, acc, row_max, row_sum,
                    scale, softcap, HEADS, HEAD_DIM, BLOCK_SIZE, TILE_K, TILE_D, WINDOW,
                    SOFTCAP, False,
                )  # fmt: skip
                block = next_block
            for other in loop(begin, end - (bound - whole)):
                key_tile = tl.where(other < whole, other, other + bound - whole)
                at = key_tile * TILE_K + keys
                block = tl.load(
                    table_row + at // BLOCK_SIZE, mask=(at >= low) & (at < limit), other=0
                )
                acc, row_max, row_sum = _attend_tile(
                    q, base, key_tile, block, limit, low, query_pos, acc, row_max, row_sum,
                    scale, softcap, HEADS, HEAD_DIM, BLOCK_SIZE, TILE_K, TILE_D, WINDOW,
                    SOFTCAP, True,
                )  # fmt: skip
            o = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
            if active == 1:
                to = out + (token * out_stride_t + head * out_stride_h)[:, None] + dims[None, :]
                tl.store(to, o.to(out.dtype.element_ty), mask=mine)
            else:
                line = ((tile * HEADS + kv_head) * splits + split) * TILE_Q + lines
                tl.store(partial_lse + line, row_max + tl.log2(row_sum))
                part_to = partial + line[:, None] * HEAD_DIM + dims[None, :]
                tl.store(part_to, o, mask=(dims < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _join_kernel(
    query_start, seq_lens, out, partial, partial_lse, out_stride_t, out_stride_h,
    first_row, num_rows, row_counts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr, JOINED: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, COUNTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """By turns, JOINED lines of a tile of `_prefill_kernel`: its parts, each weighted by its share
    of the softmax. The last part's program alone would take as long as for its part.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    QUERIES: tl.constexpr = TILE_Q // GROUP
    PIECES: tl.constexpr = TILE_Q // JOINED
    first_row, num_rows, tiles, splits = _tiles_of(
        query_start, row_counts, first_row, num_rows, SPLITS, HEADS, QUERIES, PROGRAMS, COUNTED
    )
    pieces = tl.where(splits > 1, tiles * HEADS * PIECES, 0)
    for piece in loop(tl.program_id(0), pieces, tl.num_programs(0)):
        tile = piece // PIECES // HEADS
        row, row_start, query_len, number = _tile_row(
            query_start, first_row, num_rows, tile, QUERIES
        )
        if number * QUERIES < query_len:
            low, limit, per_split, active = _tile_keys(
                tl.load(seq_lens + row), query_len, number, splits, QUERIES, TILE_K, LEAST_TILES,
                WINDOW,
            )  # fmt: skip
            if active > 1:
                lines = piece % PIECES * JOINED + tl.arange(0, JOINED)
                parts = tl.arange(0, SPLITS)
                dims = tl.arange(0, TILE_D)
                first_at = piece // PIECES * splits * TILE_Q + lines
                lse = tl.load(
                    partial_lse + first_at[:, None] + parts[None, :] * TILE_Q,
                    mask=(parts < active)[None, :], other=float("-inf"),
                )  # fmt: skip
                most = tl.max(lse, axis=1)
                most = tl.where(most == float("-inf"), 0.0, most)
                total = tl.sum(tl.exp2(lse - most[:, None]), axis=1)
                mean = tl.zeros([JOINED, TILE_D], tl.float32)
                for some in loop(0, active, 8):
                    for one in tl.static_range(8):  # whose loads need not wait for each other
                        at = first_at + (some + one) * TILE_Q
                        there = some + one < active
                        share = tl.load(partial_lse + at, mask=there, other=float("-inf"))
                        part = tl.load(
                            partial + at[:, None] * HEAD_DIM + dims[None, :],
                            mask=there & (dims < HEAD_DIM)[None, :], other=0.0,
                        )  # fmt: skip
                        mean += part * tl.exp2(share - most)[:, None]
                mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
                offsets = number * QUERIES + lines // GROUP
                token = (row_start + offsets).to(tl.int64)
                head = piece // PIECES % HEADS * GROUP + lines % GROUP
                mine = (offsets < query_len) & (lines < QUERIES * GROUP)
                tl.store(
                    out + (token * out_stride_t + head * out_stride_h)[:, None] + dims[None, :],
                    mean.to(out.dtype.element_ty), mask=mine[:, None] & (dims < HEAD_DIM)[None, :],
                )  # fmt: skip
