# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Measures fused_linear's tiles on the card that is there, against plain products.

Each candidate runs in a CUDA graph over copies of its weight that do not fit the cache together, so
that every product reads its weight from memory; the best of several replays counts. Children
compile the candidates of a size, without the card, while the one before it is measured.

What was measured goes to a log at once, a JSON line for each size and number of tokens: a run that
was stopped goes on from there.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F

from llmserve.kernels import fused_linear as table
from llmserve.kernels.compile_only import compile_only
from llmserve.kernels.fused_linear import Scratch, Tile, fused_linear, fused_linear_torch
from llmserve.kernels.paged_attention import SHARED_MEMORY_LIMIT
from llmserve.kernels.rms_norm import rms_norm
from llmserve.kernels.silu_mul import gated_act
from llmserve.kernels.triton_jit import Card
from llmserve.utils.child import Child, receive_start
from llmserve.utils.logger import get_logger

try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

logger = get_logger("llmserve.kernels.tune")

_COLD_BYTES = 150 << 20  # of weight copies: three times the 50 MiB of an H100's cache
_REPLAYS = 5
_MARGIN_S = 5.0  # before the time limit nothing is begun that took longer before
_KEPT = 5  # candidates that the log names, the fastest first
_TOLERANCE = 0.06  # of bfloat16 values of standard deviation 1, and of products of two


class Product(NamedTuple):
    """One linear layer, of half the outputs with `act`, and what stands around it."""

    out_features: int
    in_features: int
    norm: bool
    act: str | None
    residual: bool
    bias: bool = False

    @property
    def key(self) -> str:
        """Its name in the table."""
        return f"{self.out_features}x{self.in_features}{'g' if self.act else ''}"

    @classmethod
    def of_key(cls, key: str) -> Product:
        """What stands around a product can be told by its size: projections into a layer's heads or
        its MLP are the wide ones and have the norm, those out of it add the residual."""
        out_features, in_features = map(int, key.rstrip("g").split("x"))
        into = key.endswith("g") or out_features > in_features
        return cls(out_features, in_features, into, "silu" if key[-1] == "g" else None, not into)


class Measured(NamedTuple):
    """Microseconds of a plain product and of the fastest tiles, in order."""

    plain_us: float
    tiles: list[tuple[float, Tile]]

    @property
    def best(self) -> Tile | None:
        """The tile to use; None where the plain product was no slower."""
        return self.tiles[0][1] if self.tiles and self.tiles[0][0] < self.plain_us else None


class Record(msgspec.Struct):
    """A line of the log."""

    card: str
    triton: str
    key: str
    few: int
    plain_us: float
    tiles: list[tuple[float, Tile]]


def candidates(few: int, product: Product) -> list[Tile]:
    """Tiles worth a measurement for up to `few` tokens."""
    sides = 2 if product.act else 1
    n, k = product.out_features, product.in_features
    found = []
    if few == 1:
        for tile_n, tile_k, warps, splits in _grid(
            (2, 4, 8, 16, 32), (256, 512, 1024), (1, 2, 4, 8), (1, 2, 4)
        ):
            a_thread = tile_n * tile_k // (32 * warps)
            if 8 <= a_thread <= 64 // sides and n // tile_n * splits >= 128:
                found.append(Tile(tile_n, tile_k, splits, 1, warps))
    else:
        for tile_n, tile_k, splits, stages, warps in _grid(
            (16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8), (3, 4, 5), (4, 8)
        ):
            shared = stages * tile_k * (tile_n * sides + few) * 2
            if (
                (warps == 4 or tile_n >= 64)
                and (tile_k > 64 or stages > 3)
                and 100 <= n // tile_n * splits <= 1100
                and k // splits // tile_k >= 2
                and shared <= SHARED_MEMORY_LIMIT - 2048
            ):
                found.append(Tile(tile_n, tile_k, splits, stages, warps))
        for tile_n, tile_k, splits, warps in _grid(
            (8, 16, 32), (256, 512, 1024, 2048, 4096), (1, 2, 3, 4), (4, 8)
        ):
            a_thread = tile_n * tile_k * sides // (32 * warps)
            if few <= 32 and 32 <= a_thread <= 128 and 64 <= n // tile_n * splits <= 1100:
                found.append(Tile(tile_n, tile_k, splits, 1, warps))
    return [tile for tile in found if tile.divides(n, k) and table.fits(few, n, tile, sides == 2)]


def _grid(*axes: Sequence[int]) -> list[tuple[int, ...]]:
    points: list[tuple[int, ...]] = [()]
    for axis in axes:
        points = [(*point, value) for point in points for value in axis]
    return points


def graph_time(run: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Microseconds of `run(weight)`: a graph of all `weights`, the best of its replays."""
    for weight in weights[:2]:
        run(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            run(weight)
    graph.replay()
    best = float("inf")
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1000 / len(weights))
    return best


class Bench:
    """Random operands on one device, timed by `timer`."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype = torch.bfloat16,
        timer: Callable[[Callable[[torch.Tensor], object], list[torch.Tensor]], float] = graph_time,
        cold_bytes: int = _COLD_BYTES,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.timer = timer
        self.cold_bytes = cold_bytes
        self.scratch = Scratch(
            torch.empty(table.SCRATCH_FLOATS, device=device),
            torch.zeros(table.SCRATCH_TILES, dtype=torch.int32, device=device),
        )

    def measure(self, product: Product, few: int, tiles: list[Tile]) -> Measured:
        """All candidates that compile, start and compute the right thing; `few` tokens."""
        n, k = product.out_features, product.in_features
        rows = 2 * n if product.act else n
        weight_bytes = rows * k * self.dtype.itemsize
        weights = [
            self._random(rows, k) / k**0.5 for _ in range(max(4, self.cold_bytes // weight_bytes))
        ]
        x = self._random(few, k)
        bias = self._random(rows) if product.bias else None
        norm = (self._random(k), 1e-6) if product.norm else None
        residual = self._random(few, n) if product.residual else None

        sums = None if residual is None or bias is not None else residual.clone()

        def plain(weight: torch.Tensor) -> torch.Tensor:
            y = rms_norm(x, *norm) if norm else x
            if sums is not None:
                return sums.addmm_(y, weight.t())
            y = F.linear(y, weight, bias)
            y = gated_act(y, product.act) if product.act else y
            return y if residual is None else y + residual

        def fused(tile: Tile, weight: torch.Tensor) -> torch.Tensor:
            return fused_linear(x, weight, bias, norm, product.act, residual, tile, self.scratch)

        expected = fused_linear_torch(x, weights[0], bias, norm, product.act, residual)
        timed = []
        for tile in tiles:
            try:
                error = _error(fused(tile, weights[0]), expected)
                if not error <= _TOLERANCE:
                    logger.error("%s %d tokens: %s is wrong by %g", product.key, few, tile, error)
                    continue
                timed.append((self.timer(partial(fused, tile), weights), tile))
            except TritonError as failure:
                logger.info("%s %d tokens: %s: %s", product.key, few, tile, failure)
        timed.sort()
        return Measured(self.timer(plain, weights), timed[:_KEPT])

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, device=self.device).to(self.dtype)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.float(), expected.float()
    return ((got - expected).abs() / (1 + expected.abs())).max().item()


class CompileStart(msgspec.Struct):
    """What a compiling child is started with: every `step`-th candidate, from `first` on."""

    card: Card
    product: Product
    candidates: list[tuple[int, Tile]]  # tokens, tile
    first: int
    step: int


def compile_all(start: CompileStart) -> int:
    """Fills Triton's cache with this child's share; how many of it compiled."""
    product = start.product
    n, k = product.out_features, product.in_features
    rows = 2 * n if product.act else n
    weight = torch.empty(rows, k, device="meta", dtype=torch.bfloat16)
    bias = weight[:, 0].contiguous() if product.bias else None
    scratch = Scratch(
        torch.empty(1, device="meta"), torch.empty(1, dtype=torch.int32, device="meta")
    )
    with compile_only(start.card) as done:
        for few, tile in start.candidates[start.first :: start.step]:
            x = weight.new_empty(few, k)
            residual = x.new_empty(few, n) if product.residual else None
            norm = (x[0], 1e-6) if product.norm else None
            try:
                fused_linear(x, weight, bias, norm, product.act, residual, tile, scratch)
            except TritonError as failure:
                logger.info("%s %d tokens: %s: %s", product.key, few, tile, failure)
    return len(done)


class Compilers:
    """Children that compile the candidates of one product."""

    def __init__(self, card: Card, product: Product, todo: list[tuple[int, Tile]]) -> None:
        count = max(1, min((os.cpu_count() or 2) - 2, 16, len(todo) // 8))
        starts = [CompileStart(card, product, todo, i, count) for i in range(count)]
        self._children = [Child("llmserve.kernels.tune", start) for start in starts]

    def wait(self) -> None:
        """Until all are compiled. What a child left out is compiled by the first launch."""
        for child in self._children:
            code = child.process.wait()
            child.end(0.0)
            if code:
                logger.error("a child that compiles ended with code %d", code)


def tune(
    card: Card,
    products: list[Product],
    log: Path,
    output: Path,
    time_limit: float,
    bench: Bench,
    compilers: Callable[[Card, Product, list[tuple[int, Tile]]], Compilers] = Compilers,
) -> int:
    """Measures what the log has not, and writes the card's table after each product; how many
    products are left when `time_limit` seconds are over."""
    began = time.monotonic()
    products = list({product.key: product for product in products}.values())
    write_table(output, card, products, read_log(log, card))
    todo = []
    for product in products:
        done = read_log(log, card).get(product.key, {})
        missing = [(few, candidates(few, product)) for few in table.FEW if few not in done]
        if missing:
            todo.append((product, missing))

    def start(index: int) -> Compilers | None:
        if index >= len(todo):
            return None
        product, missing = todo[index]
        pairs = [(few, tile) for few, tiles in missing for tile in tiles]
        return compilers(card, product, pairs)

    compiling, longest = start(0), 0.0
    for index, (product, missing) in enumerate(todo):
        started = time.monotonic()
        if started - began + longest + _MARGIN_S > time_limit and index:
            if compiling:
                compiling.wait()
            return len(todo) - index
        assert compiling is not None
        compiling.wait()
        compiling = start(index + 1)
        for few, tiles in missing:
            measured = bench.measure(product, few, tiles)
            append_log(log, card, product, few, measured)
            print(report(product, few, measured), flush=True)
        write_table(output, card, products, read_log(log, card))
        longest = max(longest, time.monotonic() - started)
    return 0


def report(product: Product, few: int, measured: Measured) -> str:
    """One line: the plain product, the three fastest tiles, GB/s of the weight."""
    size = product.out_features * product.in_features * (2 if product.act else 1) * 2
    names = "; ".join(f"{us:.2f} us {list(tile)}" for us, tile in measured.tiles[:3])
    best = measured.tiles[0][0] if measured.tiles else float("inf")
    return (
        f"{product.key} {few} tokens: plain {measured.plain_us:.2f} us "
        f"({size / measured.plain_us / 1e3:.0f} GB/s), {names} ({size / best / 1e3:.0f} GB/s)"
    )


def _triton_version() -> str:
    return str(getattr(table.triton, "__version__", ""))


def append_log(log: Path, card: Card, product: Product, few: int, measured: Measured) -> None:
    """A line more."""
    record = Record(
        card.name, _triton_version(), product.key, few, measured.plain_us, measured.tiles
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def read_log(log: Path, card: Card) -> dict[str, dict[int, Measured]]:
    """What was measured on such a card with this Triton, by size and tokens."""
    found: dict[str, dict[int, Measured]] = {}
    for line in log.read_bytes().splitlines() if log.exists() else []:
        record = msgspec.json.decode(line, type=Record)
        if (record.card, record.triton) == (card.name, _triton_version()):
            measured = Measured(record.plain_us, record.tiles)
            found.setdefault(record.key, {})[record.few] = measured
    return found


def write_table(
    output: Path,
    card: Card,
    products: list[Product],
    measured: dict[str, dict[int, Measured]],
) -> None:
    """The shipped tables, or those in `output` where it exists, with `card`'s entry changed for
    the products of which all is measured."""
    source = output if output.exists() else table.TABLES
    tables: list[dict[str, Any]] = json.loads(source.read_text())
    own = next((entry for entry in tables if entry["card"] == card.name), None)
    tiles = dict(own["tiles"]) if own else {}
    for product in products:
        by_few = measured.get(product.key, {})
        if len(by_few) == len(table.FEW):
            tiles[product.key] = {
                str(few): list(tile) if (tile := by_few[few].best) else None for few in table.FEW
            }
    if not tiles:
        return
    entry = {
        "card": card.name, "family": card.arch // 10, "multiprocessors": card.multiprocessors,
        "tiles": tiles,
    }  # fmt: skip
    tables = [entry if old is own else old for old in tables] + ([] if own else [entry])
    text = re.sub(r"\[\s+(\d[\d,\s]*\d)\s+\]", _one_line, json.dumps(tables, indent=1))
    output.write_text(text + "\n")


def _one_line(numbers: re.Match[str]) -> str:
    return f"[{', '.join(numbers[1].replace(',', ' ').split())}]"


def known_products() -> list[Product]:
    """The sizes that the shipped tables have."""
    tables = json.loads(table.TABLES.read_text())
    keys = dict.fromkeys(key for entry in tables for key in entry["tiles"])
    return [Product.of_key(key) for key in keys]


if __name__ == "__main__":
    compile_all(receive_start(int(sys.argv[1]), CompileStart))
    os._exit(0)
