# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Log-probabilities of a token and of the likeliest ones, without a sort and without a row of them.

A row is read once, split over the card: that leaves maximum and mass of every 64 tokens and the
count of what is likelier than the token. The likeliest are then found one after the other, each in
the block whose maximum is the highest.
"""

from __future__ import annotations

import torch

from llmserve.kernels.triton_jit import loop, next_power_of_2, tl, triton, use_triton

_BLOCK = 64  # tokens a maximum is kept of
_TILE_BLOCKS = 64  # of a program
_MOST = 64  # alternatives; a sort is faster beyond

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Columns:
    """`logits` float32 [m, width], rows contiguous, -inf allowed; `token_ids` int64 [m]. Returns
    ids int64 [m, k + 1] and log-probabilities float32 [m, k + 1] of the token and then of the `k`
    likeliest in falling order, and ranks int64 [m]: 1 + the count of strictly likelier tokens.
    """
    if use_triton(logits) and k <= _MOST:
        return top_logprobs_triton(logits, token_ids, k)
    return top_logprobs_torch(logits, token_ids, k)


def top_logprobs_torch(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Columns:
    """The reference."""
    logprobs = logits.log_softmax(1)
    values = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > values).sum(1) + 1
    ids = token_ids[:, None]
    if k:
        likeliest = logprobs.topk(k, dim=1)
        values = torch.cat([values, likeliest.values], 1)
        ids = torch.cat([ids, likeliest.indices], 1)
    return ids, values, ranks


def top_logprobs_triton(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> Columns:
    """Two launches. Of equal logits the lowest token id comes first."""
    m, width = logits.shape
    device = logits.device
    ids = torch.empty(m, k + 1, dtype=torch.int64, device=device)
    values = torch.empty(m, k + 1, device=device)
    ranks = torch.empty(m, dtype=torch.int64, device=device)
    if m == 0:
        return ids, values, ranks
    num_blocks = -(-width // _BLOCK)
    programs = -(-num_blocks // _TILE_BLOCKS)
    blocks = torch.empty(m, 2, num_blocks, device=device)
    likelier = torch.empty(m, programs, dtype=torch.int32, device=device)
    _scan_kernel[(m, programs)](
        logits, token_ids, blocks, likelier, logits.stride(0), width,
        BLOCK=_BLOCK, TILE_BLOCKS=_TILE_BLOCKS, num_warps=4,
    )  # fmt: skip
    _select_kernel[(m,)](
        logits, token_ids, blocks, likelier, ids, values, ranks, logits.stride(0), width, k,
        BLOCK=_BLOCK, ALL_BLOCKS=next_power_of_2(num_blocks), PROGRAMS=next_power_of_2(programs),
        TILE_BLOCKS=_TILE_BLOCKS, num_warps=8,
    )  # fmt: skip
    return ids, values, ranks


@triton.jit(
    do_not_specialize=["stride", "width"],
    do_not_specialize_on_alignment=["logits", "token_ids"],  # views of a batch's rows
)
def _scan_kernel(
    logits, token_ids, blocks, likelier, stride, width,
    BLOCK: tl.constexpr, TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(width, BLOCK)
    row_logits = logits + row * stride
    own = tl.load(row_logits + tl.load(token_ids + row))
    block = tl.program_id(1) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(row_logits + token, mask=token < width, other=float("-inf"))
    x = tl.where(x < float("inf"), x, float("-inf"))  # of a row with NaN or +inf nothing is used
    top = tl.max(x, 1)
    mass = tl.sum(tl.exp(x - tl.maximum(top, -3.4028234663852886e38)[:, None]), 1)
    tl.store(blocks + row * 2 * num_blocks + block, top, mask=block < num_blocks)
    tl.store(blocks + (row * 2 + 1) * num_blocks + block, mass, mask=block < num_blocks)
    count = tl.sum(tl.sum((x > own).to(tl.int32), 1), 0)
    tl.store(likelier + row * tl.num_programs(1) + tl.program_id(1), count)


@triton.jit(
    do_not_specialize=["stride", "width", "k"],
    do_not_specialize_on_alignment=["logits", "token_ids"],  # views of a batch's rows
)
def _select_kernel(
    logits, token_ids, blocks, likelier, ids, values, ranks, stride, width, k,
    BLOCK: tl.constexpr, ALL_BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    num_blocks = tl.cdiv(width, BLOCK)
    row_logits = logits + row * stride
    number = tl.arange(0, ALL_BLOCKS)
    of_block = blocks + row * 2 * num_blocks + number
    maxima = tl.load(of_block, mask=number < num_blocks, other=float("-inf"))
    masses = tl.load(of_block + num_blocks, mask=number < num_blocks, other=0.0)
    top = tl.maximum(tl.max(maxima), -3.4028234663852886e38)
    log_total = tl.log(tl.maximum(tl.sum(masses * tl.exp(maxima - top)), 1e-30))
    programs = tl.cdiv(num_blocks, TILE_BLOCKS)
    part = tl.arange(0, PROGRAMS)
    counts = tl.load(likelier + row * programs + part, mask=part < programs, other=0)
    tl.store(ranks + row, 1 + tl.sum(counts).to(tl.int64))
    out = row * (k + 1)
    own = tl.load(token_ids + row)
    tl.store(ids + out, own)
    tl.store(values + out, tl.load(row_logits + own) - top - log_total)
    lane = tl.arange(0, BLOCK)
    last, last_id = top + 1.0, -1
    for i in loop(0, k):
        # What comes next: the lowest id, behind the last one, of the highest value that is left.
        # A row that does not hold that many is no reason to read outside
        best = tl.max(maxima)
        block = tl.min(tl.where(maxima == best, number, num_blocks - 1))
        token = block * BLOCK + lane
        x = tl.load(row_logits + token, mask=token < width, other=float("nan"))
        is_next = (x == best) & (token > tl.where(best < last, -1, last_id))
        pick = tl.min(tl.where(is_next, token, width - 1))
        tl.store(ids + out + 1 + i, pick.to(tl.int64))
        tl.store(values + out + 1 + i, best - top - log_total)
        left = (x < best) | ((x == best) & (token > pick))
        rest = tl.max(tl.where(left, x, float("-inf")))
        maxima = tl.where(number == block, rest, maxima)
        last, last_id = best, pick
