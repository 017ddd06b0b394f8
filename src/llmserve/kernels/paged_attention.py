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
_LEAST_TILES = 4  # of keys in a split of a prompt


def num_splits(num_rows: int, num_kv_heads: int, max_keys: int, num_sms: int) -> int:
    """Splits of a decode row's keys: about two programs a multiprocessor, each of 64 keys or more.
    A power of two; depends on nothing but the launch's fixed sizes.
    """
    wanted = -(-2 * num_sms // (num_rows * num_kv_heads))
    most = min(max(max_keys // 64, 1), _MAX_SPLITS)
    return min(next_power_of_2(wanted), 1 << (most.bit_length() - 1))


def tile_sizes(head_dim: int, element_size: int, decode: bool) -> tuple[int, int, int, int]:
    """(queries, keys, stages, warps) of a tile; within SHARED_MEMORY_LIMIT for every head_dim."""
    row_bytes = next_power_of_2(head_dim) * element_size
    if decode:
        return 16, 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16, 2, 4
    if row_bytes <= 256:
        return 64, 64, 2, 4
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
    """Of tiles that the device counts; [programs, queries of a tile]. Tiles are split for as many
    programs, two a multiprocessor."""

    def __init__(self, device: torch.device, group: int, head_dim: int, element_size: int) -> None:
        super().__init__(device)
        programs = 2 * self.num_sms
        tile_q = max(tile_sizes(head_dim, element_size, False)[0], group)
        self._allocate((programs, tile_q), head_dim, programs)


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
        grid = (max(len(partial), min(num_rows * num_kv_heads, 2 * len(partial))),)
    tile_q, tile_k, stages, warps = tile_sizes(head_dim, query.element_size(), True)
    _decode_kernel[grid](
        query, kv_cache, block_table, seq_lens, out, partial, partial_lse, arrived,
        arrived if row_counts is None else row_counts,
        query.stride(0), query.stride(1), block_table.stride(0), scale, softcap or 0.0,
        HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, SPLITS=splits,
        PROGRAMS=0 if row_counts is None else len(partial),
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
    num_rows = len(seq_lens) - first_row
    tile_q, tile_k, stages, warps = tile_sizes(head_dim, query.element_size(), False)
    partial, partial_lse, arrived = scratch.partial, scratch.partial_lse, scratch.arrived
    programs = len(partial)
    if row_counts is None:  # as the kernel counts them
        tiles = (num_tokens - first_row + num_rows * (tile_q - 1)) // tile_q * num_heads
        programs = tiles * min(max(programs // tiles, 1), _MAX_SPLITS)
    _prefill_kernel[(programs,)](
        query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse, arrived,
        query.stride(0), query.stride(1), out.stride(0), out.stride(1), block_table.stride(0),
        seq_lens if row_counts is None else row_counts, first_row, num_rows, scale, softcap or 0.0,
        HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size,
        PROGRAMS=len(partial), SPLITS=_MAX_SPLITS, LEAST_TILES=_LEAST_TILES,
        TILE_Q=tile_q, TILE_K=tile_k, TILE_D=next_power_of_2(head_dim),
        WINDOW=window or 0, SOFTCAP=softcap is not None, COUNTED=row_counts is not None,
        num_stages=stages, num_warps=warps,
    )  # fmt: skip


@triton.jit
def _attend_tile(
    q, kv_head_base, table_row, start, limit, low, query_pos, acc, row_max, row_sum,
    kv_block_stride, value_offset, scale, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [start, start + TILE_K) that lie in [low, limit)."""
    key_pos = start + tl.arange(0, TILE_K)
    dims = tl.arange(0, TILE_D)
    written = (key_pos >= low) & (key_pos < limit)
    block = tl.load(table_row + key_pos // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
    rows = block * kv_block_stride + (key_pos % BLOCK_SIZE) * HEAD_DIM
    inside = written[:, None] & (dims < HEAD_DIM)[None, :]
    k = tl.load(kv_head_base + rows[:, None] + dims[None, :], mask=inside, other=0.0)
    v = tl.load(kv_head_base + value_offset + rows[:, None] + dims[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    seen = written[None, :] & (key_pos[None, :] <= query_pos[:, None])
    if WINDOW > 0:
        seen = seen & (key_pos[None, :] > query_pos[:, None] - WINDOW)
    scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp(scores - finite_max[:, None])
    decay = tl.exp(row_max - finite_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = acc * decay[:, None]
    acc = acc + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
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


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _prefill_kernel(
    query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse, arrived,
    query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
    row_counts, first_row, num_rows, scale, softcap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PROGRAMS: tl.constexpr, SPLITS: tl.constexpr, LEAST_TILES: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """One program takes by turns: TILE_Q queries of one row and one of HEADS heads, and a split of
    the keys, which are split for PROGRAMS programs. Row r's tiles start at number (its first token
    + r * (TILE_Q - 1)) // TILE_Q, which leaves each row at least the tiles that it needs, and a
    single one no more. The last tiles, which have most keys, come first.
    """
    if COUNTED:
        first_row = tl.load(row_counts)
        num_rows = tl.load(row_counts + 1) - first_row
    tokens = tl.load(query_start + first_row + num_rows) - first_row
    tiles = (tokens + num_rows * (TILE_Q - 1)) // TILE_Q
    splits = _num_splits(tiles * HEADS, PROGRAMS, SPLITS)
    for unit in loop(tl.program_id(0), tiles * HEADS * splits, tl.num_programs(0)):
        _prefill_part(
            query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse, arrived,
            query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
            first_row, num_rows, scale, softcap,
            tiles - 1 - unit % tiles, (unit // tiles % HEADS).to(tl.int64),
            unit // tiles // HEADS, splits,
            HEADS, GROUP, HEAD_DIM, BLOCK_SIZE, LEAST_TILES, TILE_Q, TILE_K, TILE_D, WINDOW,
            SOFTCAP,
        )  # fmt: skip


@triton.jit
def _prefill_part(
    query, kv_cache, block_table, query_start, seq_lens, out, partial, partial_lse, arrived,
    query_stride_t, query_stride_h, out_stride_t, out_stride_h, table_stride,
    first_row, num_rows, scale, softcap, tile, head, split, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LEAST_TILES: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, TILE_D: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile, a head, one of `splits` of the keys, if there are LEAST_TILES tiles of keys for each.
    The last one to arrive joins them, each weighted by its share of the softmax."""
    left = 0
    right = num_rows
    while right - left > 1:
        middle = (left + right) // 2
        start = tl.load(query_start + first_row + middle) - first_row
        if (start + middle * (TILE_Q - 1)) // TILE_Q <= tile:
            left = middle
        else:
            right = middle
    row = (first_row + left).to(tl.int64)
    row_start = tl.load(query_start + row)
    row_end = tl.load(query_start + row + 1)
    number = tile - (row_start - first_row + left * (TILE_Q - 1)) // TILE_Q
    query_len = row_end - row_start
    if number * TILE_Q < query_len:
        length = tl.load(seq_lens + row)
        offsets = number * TILE_Q + tl.arange(0, TILE_Q)
        dims = tl.arange(0, TILE_D)
        mine = (offsets < query_len)[:, None] & (dims < HEAD_DIM)[None, :]
        token = (row_start + offsets).to(tl.int64)
        q = tl.load(
            query + token[:, None] * query_stride_t + head * query_stride_h + dims[None, :],
            mask=mine, other=0.0,
        )  # fmt: skip
        query_pos = length - query_len + offsets
        limit = tl.minimum(length, length - query_len + (number + 1) * TILE_Q)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(length - query_len + number * TILE_Q - WINDOW + 1, 0)
        first_tile = low // TILE_K
        key_tiles = tl.cdiv(limit, TILE_K) - first_tile
        per_split = tl.maximum(tl.cdiv(key_tiles, splits), LEAST_TILES)
        active = tl.cdiv(key_tiles, per_split)
        begin = first_tile + split * per_split
        if split < active:
            acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
            row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
            row_sum = tl.zeros([TILE_Q], tl.float32)
            side = BLOCK_SIZE * HEAD_DIM
            base = kv_cache + (head // GROUP) * side
            value_offset = (HEADS // GROUP) * side
            for key_tile in loop(begin, tl.minimum(begin + per_split, first_tile + key_tiles)):
                acc, row_max, row_sum = _attend_tile(
                    q, base, block_table + row * table_stride, key_tile * TILE_K, limit, low,
                    query_pos, acc, row_max, row_sum, 2 * value_offset, value_offset, scale,
                    softcap, HEAD_DIM, BLOCK_SIZE, TILE_K, TILE_D, WINDOW, SOFTCAP,
                )  # fmt: skip
            o = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
            to = out + token[:, None] * out_stride_t + head * out_stride_h + dims[None, :]
            if active == 1:
                tl.store(to, o.to(out.dtype.element_ty), mask=mine)
            else:
                counter = tile * HEADS + head
                part_at = counter * splits * TILE_Q + tl.arange(0, TILE_Q)
                own_at = part_at + split * TILE_Q
                there = (dims < HEAD_DIM)[None, :]
                tl.store(partial_lse + own_at, row_max + tl.log(row_sum))
                tl.store(partial + own_at[:, None] * HEAD_DIM + dims[None, :], o, mask=there)
                tl.debug_barrier()
                if tl.atomic_add(arrived + counter, 1, sem="acq_rel") == active - 1:
                    acc = tl.zeros([TILE_Q, TILE_D], tl.float32)
                    row_max = tl.full([TILE_Q], float("-inf"), tl.float32)
                    row_sum = tl.zeros([TILE_Q], tl.float32)
                    for other in loop(0, active):
                        from_at = part_at + other * TILE_Q
                        lse = tl.load(partial_lse + from_at, cache_modifier=".cg")
                        part = tl.load(
                            partial + from_at[:, None] * HEAD_DIM + dims[None, :],
                            mask=there, other=0.0, cache_modifier=".cg",
                        )  # fmt: skip
                        new_max = tl.maximum(row_max, lse)
                        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
                        share, decay = tl.exp(lse - finite_max), tl.exp(row_max - finite_max)
                        acc = acc * decay[:, None] + part * share[:, None]
                        row_sum = row_sum * decay + share
                        row_max = new_max
                    o = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
                    tl.store(to, o.to(out.dtype.element_ty), mask=mine)
                    tl.store(arrived + counter, 0)
