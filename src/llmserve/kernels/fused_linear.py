# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A linear layer for few tokens with what stands before and behind it in one kernel.

With few tokens a product reads its weight once and nothing else counts: RMSNorm is applied while
the input is read, the activation or the residual while the output is written. The first weights are
loaded while the kernel before still runs. The weight is the left operand, so that tokens, however
few, are the narrow side of the tensor cores' tile; one token needs none of these.

fused_linear.json holds measured tiles by card and size of weight; null is where a plain product
with kernels around it was no slower. `llmserve tune-kernels` writes it (tune.py says how).
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from llmserve.kernels.rms_norm import rms_norm_torch
from llmserve.kernels.silu_mul import gated_act_of, gated_act_torch
from llmserve.kernels.triton_jit import Card, card_of, loop, next_power_of_2, pdl_of, tl, triton


class Tile(NamedTuple):
    """How a product is cut: outputs and inputs of a tile, parts of the inputs, stages, warps. Where
    nothing is staged, the tensor cores of each warp take a part of the tile's inputs, straight from
    registers, so that a whole tile is on its way before the kernel before has ended."""

    n: int
    k: int
    splits: int
    stages: int
    warps: int

    def divides(self, out_features: int, in_features: int) -> bool:
        """Whether `fused_linear` can use it for a weight of this size."""
        return out_features % self.n == 0 and in_features % (self.k * self.splits) == 0


TABLES = Path(__file__).with_suffix(".json")
FEW = (1, 8, 16, 32, 64)  # tokens, up to which a tile is chosen
# Where no card was measured with a weight; the first that divides it.
_UNMEASURED = {
    1: (Tile(4, 1024, 1, 1, 4), Tile(4, 512, 1, 1, 2), Tile(4, 256, 1, 1, 2), Tile(4, 64, 1, 1, 1)),
    16: (Tile(64, 128, 4, 3, 4), Tile(32, 128, 4, 3, 4), Tile(32, 64, 2, 3, 4)),
}
SCRATCH_FLOATS, SCRATCH_TILES = 1 << 21, 1 << 13


def tile_for(
    num_tokens: int, out_features: int, in_features: int, act: bool, device: torch.device
) -> Tile | None:
    """The tile for a weight of this size (half the outputs, with `act`) and up to so many tokens,
    which are rounded up; None where a plain product is better."""
    return _tile_for(num_tokens, out_features, in_features, act, card_of(device))


@functools.cache
def _tile_for(
    num_tokens: int, out_features: int, in_features: int, act: bool, card: Card | None
) -> Tile | None:
    size = f"{out_features}x{in_features}{'g' if act else ''}"
    tiles = _measured(card).get(size, _UNMEASURED)
    few = next((few for few in tiles if num_tokens <= few), None)
    if few is None:
        return None
    for tile in tiles[few]:
        if fits(few, out_features, tile, act) and tile.divides(out_features, in_features):
            return tile
    return None


def fits(few: int, out_features: int, tile: Tile, act: bool) -> bool:
    """Whether the shared scratch is enough for the splits of `few` tokens."""
    return tile.splits == 1 or (
        scratch_size(few, out_features, tile, act) <= SCRATCH_FLOATS
        and out_features // tile.n <= SCRATCH_TILES
    )


def tables_id() -> str:
    """Of the measured tiles: with others, sums are in another order."""
    return hashlib.sha256(TABLES.read_bytes()).hexdigest()[:8]


@functools.cache
def _measured(card: Card | None) -> dict[str, dict[int, tuple[Tile, ...]]]:
    """The tiles of the card that is nearest among those of the same family, none where a plain
    product is better, by tokens up to which they are meant, in order."""
    tables = json.loads(TABLES.read_text())
    tables = [table for table in tables if card and table["family"] == card.arch // 10]
    if card is None or not tables:
        return {}
    nearest = min(
        tables,
        key=lambda t: (
            t["card"] != card.name,
            abs(t["multiprocessors"] - card.multiprocessors),
        ),
    )
    return {
        size: {int(few): (Tile(*tile),) if tile else () for few, tile in tiles.items()}
        for size, tiles in nearest["tiles"].items()
    }


@functools.cache
def scratch_of(device: torch.device) -> Scratch:
    """What all products of a device share: they run on one stream."""
    return Scratch(
        torch.empty(SCRATCH_FLOATS, device=device),
        torch.zeros(SCRATCH_TILES, dtype=torch.int32, device=device),
    )


def fused_linear_torch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    act: str | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """The reference: act(norm(x) W^T + b) + residual."""
    if norm is not None:
        x = rms_norm_torch(x, *norm)
    x = F.linear(x, weight, bias)
    if act is not None:
        x = gated_act_torch(x, act)
    return x if residual is None else x + residual


class Scratch(NamedTuple):
    """What products with splits share on one stream: `partial` float32, and `arrived` int32, which
    is zeros, and zeros again afterwards."""

    partial: torch.Tensor
    arrived: torch.Tensor


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None,
    act: str | None,
    residual: torch.Tensor | None,
    tile: Tile,
    scratch: Scratch,
) -> torch.Tensor:
    """`x` [num_tokens <= 64, in_features], `weight` [out_features, in_features], `bias`
    [out_features], `norm` RMSNorm's weight [in_features] and eps, `act` "silu" or "gelu_tanh" of
    the first half of the outputs times the second, `residual` like the result. All contiguous.
    `x` times the norm's weight must be in the dtype's range.
    Returns a new [num_tokens, out_features], or half as wide with `act`.

    `tile` must divide the weight (of half the outputs, with `act`). With splits, `scratch` holds
    `scratch_size` floats and a counter for each tile of outputs.
    """
    num_tokens, in_features = x.shape
    out_features = weight.shape[0] // (2 if act else 1)
    out = torch.empty(num_tokens, out_features, dtype=x.dtype, device=x.device)
    tile_m = _tile_m(num_tokens, tile)
    partial, arrived = scratch
    norm_weight, eps = norm or (x, 0.0)
    _linear_kernel[(out_features // tile.n, tile.splits)](
        x, weight, x if bias is None else bias, norm_weight, x if residual is None else residual,
        out, partial, arrived, num_tokens, out_features, eps,
        K=in_features, TILE_M=tile_m, TILE_N=tile.n, TILE_K=tile.k, SPLITS=tile.splits,
        NORM=norm is not None, ACT={None: 0, "silu": 1, "gelu_tanh": 2}[act],
        BIAS=bias is not None, RESIDUAL=residual is not None,
        PARTS=parts(tile_m, tile), **pdl_of(x),
        num_stages=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def scratch_size(num_tokens: int, out_features: int, tile: Tile, act: bool) -> int:
    """Floats of `scratch.partial`: every split's sums, and its share of the norm."""
    tiles = out_features // tile.n
    return tiles * tile.splits * _tile_m(num_tokens, tile) * (tile.n * (2 if act else 1) + 1)


def _tile_m(num_tokens: int, tile: Tile) -> int:
    """Tokens of a tile: of the tensor cores' two sides, the narrow one has 8, the other 16."""
    least = 8 if tile.n >= 16 else 16
    return 1 if num_tokens == 1 else max(least, next_power_of_2(num_tokens))


def parts(tile_m: int, tile: Tile) -> int:
    """Of a tile's inputs, that warps take each."""
    return tile.warps if tile_m > 1 and tile.stages == 1 else 1


@triton.jit
def _multiply(w, x_part, acc, TILE_M: tl.constexpr, PARTS: tl.constexpr):
    if TILE_M == 1:
        acc += w.to(tl.float32) * tl.trans(x_part).to(tl.float32)
    elif PARTS > 1:
        w = tl.reshape(w, [w.shape[0], PARTS, w.shape[1] // PARTS])
        x_part = tl.reshape(x_part, [PARTS, x_part.shape[0] // PARTS, TILE_M])
        if w.shape[0] < 16:  # the narrow side
            acc = tl.dot(
                tl.permute(x_part, (0, 2, 1)), tl.permute(w, (1, 2, 0)), acc, input_precision="ieee"
            )
        else:
            acc = tl.dot(tl.permute(w, (1, 0, 2)), x_part, acc, input_precision="ieee")
    else:
        acc = tl.dot(w, x_part, acc, input_precision="ieee")
    return acc


@triton.jit
def _scaled(x_part, norm_weight, k, squares, NORM: tl.constexpr):
    """The norm but for its common factor, which is known at the end."""
    if NORM:
        wide = x_part.to(tl.float32)
        squares += tl.sum(wide * wide, 0)
        x_part = (wide * tl.load(norm_weight + k).to(tl.float32)[:, None]).to(x_part.dtype)
    return x_part, squares


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x, weight, bias, norm_weight, residual, out, partial, arrived, num_tokens, out_features, eps,
    K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    SPLITS: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, PDL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    n = tile * TILE_N + tl.arange(0, TILE_N)
    m = tl.arange(0, TILE_M)
    k = tl.arange(0, TILE_K)
    there = m < num_tokens
    start = split * (K // SPLITS)
    w_at = weight + n.to(tl.int64)[:, None] * K + start + k[None, :]
    up_at = w_at + out_features.to(tl.int64) * K
    x_at = x + m[None, :] * K + start + k[:, None]
    # The first weights do not wait for the kernel before
    w = tl.load(w_at)
    if ACT > 0:
        up = tl.load(up_at)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    squares = tl.zeros([TILE_M], tl.float32)
    if TILE_M == 1:
        acc = tl.zeros([TILE_N, TILE_K], tl.float32)
        up_acc = tl.zeros([TILE_N, TILE_K], tl.float32)
    elif PARTS > 1:
        outer: tl.constexpr = TILE_N if TILE_N >= 16 else TILE_M
        inner: tl.constexpr = TILE_M if TILE_N >= 16 else TILE_N
        acc = tl.zeros([PARTS, outer, inner], tl.float32)
        up_acc = tl.zeros([PARTS, outer, inner], tl.float32)
    else:
        acc = tl.zeros([TILE_N, TILE_M], tl.float32)
        up_acc = tl.zeros([TILE_N, TILE_M], tl.float32)
    x_part = tl.load(x_at, mask=there[None, :], other=0.0)
    x_part, squares = _scaled(x_part, norm_weight, start + k, squares, NORM)
    acc = _multiply(w, x_part, acc, TILE_M, PARTS)
    if ACT > 0:
        up_acc = _multiply(up, x_part, up_acc, TILE_M, PARTS)
    for step in loop(1, K // SPLITS // TILE_K):
        shift = step * TILE_K
        w = tl.load(w_at + shift)
        x_part = tl.load(x_at + shift, mask=there[None, :], other=0.0)
        x_part, squares = _scaled(x_part, norm_weight, start + shift + k, squares, NORM)
        acc = _multiply(w, x_part, acc, TILE_M, PARTS)
        if ACT > 0:
            up = tl.load(up_at + shift)
            up_acc = _multiply(up, x_part, up_acc, TILE_M, PARTS)
    if TILE_M == 1:
        acc = tl.sum(acc, 1)[:, None]
        up_acc = tl.sum(up_acc, 1)[:, None]
    elif PARTS > 1:
        acc = tl.sum(acc, 0)
        up_acc = tl.sum(up_acc, 0)
        if TILE_N < 16:
            acc, up_acc = tl.trans(acc), tl.trans(up_acc)

    last = True
    if SPLITS > 1:
        size = TILE_N * TILE_M
        place = (n - tile * TILE_N)[:, None] * TILE_M + m[None, :]
        both: tl.constexpr = 2 if ACT > 0 else 1
        part = partial + (tile * SPLITS + split) * (both * size + TILE_M)
        tl.store(part + place, acc)
        if ACT > 0:
            tl.store(part + size + place, up_acc)
        if NORM:
            tl.store(part + both * size + m, squares)
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            # In the order of the splits, whoever came last
            part = partial + tile * SPLITS * (both * size + TILE_M)
            acc = tl.zeros([TILE_N, TILE_M], tl.float32)
            up_acc = tl.zeros([TILE_N, TILE_M], tl.float32)
            squares = tl.zeros([TILE_M], tl.float32)
            for _ in tl.static_range(SPLITS):
                acc += tl.load(part + place, cache_modifier=".cg")
                if ACT > 0:
                    up_acc += tl.load(part + size + place, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(part + both * size + m, cache_modifier=".cg")
                part += both * size + TILE_M
            tl.store(arrived + tile, 0)
    if last:
        if NORM:
            factor = 1.0 / tl.sqrt(squares / K + eps)
            acc *= factor[None, :]
            if ACT > 0:
                up_acc *= factor[None, :]
        if BIAS:
            acc += tl.load(bias + n).to(tl.float32)[:, None]
            if ACT > 0:
                up_acc += tl.load(bias + out_features + n).to(tl.float32)[:, None]
        kind = out.dtype.element_ty
        if ACT > 0:
            acc = gated_act_of(
                acc.to(kind).to(tl.float32), up_acc.to(kind).to(tl.float32), ACT == 2
            )
        to = m[None, :] * out_features + n[:, None]
        if RESIDUAL:
            acc += tl.load(residual + to, mask=there[None, :], other=0.0).to(tl.float32)
        tl.store(out + to, acc.to(kind), mask=there[None, :])
