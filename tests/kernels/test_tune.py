# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve import envs
from llmserve.kernels import fused_linear as table
from llmserve.kernels import tune as module
from llmserve.kernels.fused_linear import Tile
from llmserve.kernels.triton_jit import Card
from llmserve.kernels.tune import (
    Bench,
    CompileStart,
    Measured,
    Product,
    candidates,
    compile_all,
    known_products,
    read_log,
    tune,
)
from llmserve.worker.device import present_card
from tests.helpers.paged import run_interpreted

torch.set_num_threads(1)

CARD = Card("Card B", 90, 78)
SMALL = [
    Product(128, 64, True, None, False, bias=True),
    Product(64, 128, False, None, True),
    Product(96, 64, True, "silu", False),
]


def test_sizes_tell_what_stands_around_them() -> None:
    assert Product.of_key("6144x4096") == Product(6144, 4096, True, None, False)
    assert Product.of_key("4096x4096") == Product(4096, 4096, False, None, True)
    assert Product.of_key("3072x1024g") == Product(3072, 1024, True, "silu", False)
    shipped = {key for t in json.loads(table.TABLES.read_text()) for key in t["tiles"]}
    assert {product.key for product in known_products()} == shipped


def test_candidates_divide_fit_and_hold_what_was_measured_best() -> None:
    """Those that the shipped table chose are among the candidates."""
    (shipped,) = [t for t in json.loads(table.TABLES.read_text()) if "H100" in t["card"]]
    missing = []
    for key, tiles in shipped["tiles"].items():
        product = Product.of_key(key)
        for few in table.FEW:
            found = candidates(few, product)
            assert 5 < len(found) == len(set(found)) < 150, (key, few)
            for tile in found:
                assert tile.divides(product.out_features, product.in_features)
            if tiles.get(str(few)) and Tile(*tiles[str(few)]) not in found:
                missing.append((key, few, tiles[str(few)]))
    assert missing == []


class FakeBench:
    """The last candidate is the fastest; a product of 64 inputs is faster plain."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.asked: list[tuple[str, int]] = []
        self.seconds = seconds

    def measure(self, product: Product, few: int, tiles: list[Tile]) -> Measured:
        self.asked.append((product.key, few))
        time.sleep(self.seconds)
        timed = [(10.0 - i / 1000, tile) for i, tile in enumerate(tiles)]
        return Measured(1.0 if product.in_features == 1024 else 20.0, sorted(timed)[:5])


class FakeCompilers:
    started: list[tuple[Card, str, int]] = []
    waited = 0

    def __init__(self, card: Card, product: Product, todo: list[tuple[int, Tile]]) -> None:
        self.started.append((card, product.key, len(todo)))

    def wait(self) -> None:
        FakeCompilers.waited += 1


@pytest.fixture
def tuned(tmp_path: Path) -> Callable[..., int]:
    FakeCompilers.started, FakeCompilers.waited = [], 0
    output, log = tmp_path / "tiles.json", tmp_path / "folder" / "log.jsonl"
    old = [
        {"card": "Card A", "family": 9, "multiprocessors": 132, "tiles": {"1x1": {"1": None}}},
        {"card": "Card B", "family": 9, "multiprocessors": 78, "tiles": {"8x8": {"1": [1, 2]}}},
    ]
    output.write_text(json.dumps(old))

    def run(bench: Any, limit: float = 1e9, card: Card = CARD, **options: Any) -> int:
        names = options.get("names", ["2048x1024", "1024x2048"])
        products = [Product.of_key(name) for name in names]
        return tune(card, products, log, output, limit, bench, FakeCompilers)  # type: ignore[arg-type]

    run.output, run.log = output, log  # type: ignore[attr-defined]
    return run


def test_writes_the_entry_of_its_card_alone(tuned: Any) -> None:
    bench = FakeBench()
    assert tuned(bench, names=["2048x1024", "1024x2048", "2048x1024"]) == 0
    assert bench.asked == [(k, f) for k in ("2048x1024", "1024x2048") for f in table.FEW]
    assert [key for _, key, _ in FakeCompilers.started] == ["2048x1024", "1024x2048"]
    assert all(card == CARD and count > 40 for card, _, count in FakeCompilers.started)
    first, second = json.loads(tuned.output.read_text())
    assert (first["card"], first["tiles"]) == ("Card A", {"1x1": {"1": None}})
    assert second["tiles"].pop("8x8") == {"1": [1, 2]}  # not asked for, so kept
    assert second["tiles"].pop("2048x1024") == dict.fromkeys(map(str, table.FEW))  # plain was best
    expected = {str(f): list(candidates(f, Product.of_key("1024x2048"))[-1]) for f in table.FEW}
    assert second["tiles"] == {"1024x2048": expected}
    assert f'"1": {expected["1"]}' in tuned.output.read_text()


def test_a_card_without_an_entry_gets_one(tuned: Any) -> None:
    assert tuned(FakeBench(), card=Card("Card C", 120, 188), names=["1024x2048"]) == 0
    tables = json.loads(tuned.output.read_text())
    assert [t["card"] for t in tables] == ["Card A", "Card B", "Card C"]
    assert (tables[2]["family"], tables[2]["multiprocessors"]) == (12, 188)
    assert list(tables[2]["tiles"]) == ["1024x2048"]


def test_goes_on_where_it_stopped(tuned: Any) -> None:
    first, second, third = FakeBench(0.01), FakeBench(), FakeBench()
    assert tuned(first, limit=0.0) == 1  # one product, whatever the limit
    assert {key for key, _ in first.asked} == {"2048x1024"}
    assert FakeCompilers.waited == len(FakeCompilers.started)  # no child is left
    lines = tuned.log.read_text().splitlines()
    tuned.log.write_text("\n".join(lines[:-1]) + "\n")  # stopped before the last
    assert tuned(second) == 0
    assert second.asked == [("2048x1024", 64), *(("1024x2048", few) for few in table.FEW)]
    assert tuned(third) == 0 and third.asked == []
    other = Card("Card A", 90, 132)
    assert read_log(tuned.log, other) == {} and len(read_log(tuned.log, CARD)) == 2


if envs.TRITON_INTERPRET:

    @pytest.mark.parametrize("product", SMALL)
    def test_measures_what_is_right_and_sorts(product: Product) -> None:
        times = iter((3.0, 1.0, 7.0))
        seen = []

        def timer(run: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> Any:
            assert len(weights) >= 4
            seen.append(run(weights[0]))
            return next(times)

        bench = Bench("cpu", torch.float32, timer, 0)
        tiles = [Tile(32, 32, 1, 3, 4), Tile(16, 32, 2, 3, 4)]
        measured = bench.measure(product, 5, tiles)
        assert measured == Measured(7.0, [(1.0, tiles[1]), (3.0, tiles[0])])
        torch.testing.assert_close(seen[0], seen[1])
        torch.testing.assert_close(seen[0], seen[2])  # the baseline computes the same

    def test_a_wrong_tile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
        right = module.fused_linear
        monkeypatch.setattr(module, "fused_linear", lambda *args: right(*args) + 0.3)
        bench = Bench("cpu", torch.float32, lambda run, weights: 1.0, 0)
        assert bench.measure(SMALL[1], 2, [Tile(32, 32, 1, 3, 4)]) == Measured(1.0, [])

else:

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize("product", SMALL)
    def test_children_share_the_candidates(product: Product) -> None:
        tiles = [
            (1, Tile(8, 32, 1, 1, 1)),
            (16, Tile(32, 32, 1, 3, 4)),
            (16, Tile(16, 32, 1, 3, 4)),
        ]
        done = [compile_all(CompileStart(CARD, product, tiles, first, 2)) for first in (0, 1)]
        assert done == [2, 1]

    @pytest.mark.gpu
    def test_gpu_measures_and_finds_what_a_child_compiled(tmp_path: Path) -> None:
        products = [Product(2048, 512, True, None, False), Product(512, 1024, False, None, True)]
        card = present_card()
        assert card is not None
        output, log = tmp_path / "tiles.json", tmp_path / "log.jsonl"
        assert tune(card, products, log, output, 100.0, Bench("cuda")) == 0
        found = read_log(log, card)
        assert found.keys() == {product.key for product in products}
        for by_few in found.values():
            for measured in by_few.values():
                assert 0.5 < measured.plain_us < 200 and len(measured.tiles) == 5
