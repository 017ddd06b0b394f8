# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Fused products against float64, and that every shape of tile compiles within shared memory."""

import json

import pytest
import torch

from llmserve import envs
from llmserve.kernels import fused_linear as module
from llmserve.kernels.fused_linear import (
    Scratch,
    Tile,
    fused_linear,
    fused_linear_torch,
    parts,
    scratch_size,
    tile_for,
)
from llmserve.layers.base import Build
from llmserve.layers.linear import Linear
from llmserve.quantization import unquantized
from llmserve.quantization.base import NormSpec
from llmserve.quantization.unquantized import UnquantizedLinear
from tests.helpers.compile_kernel import ARCHITECTURES, compile_for
from tests.helpers.paged import run_interpreted

CASES = [  # tokens, outputs, inputs, tile, bias, norm, act, residual
    (1, 48, 96, Tile(8, 32, 1, 1, 4), False, False, None, False),
    (1, 48, 96, Tile(16, 32, 3, 1, 4), True, True, None, True),
    (1, 32, 128, Tile(8, 64, 1, 1, 4), True, True, "silu", False),
    (1, 32, 128, Tile(8, 32, 2, 1, 4), False, True, "gelu_tanh", False),
    (3, 64, 96, Tile(32, 32, 1, 2, 4), True, True, None, True),
    (16, 64, 128, Tile(16, 32, 2, 2, 4), False, True, "silu", False),
    (17, 32, 64, Tile(16, 32, 2, 3, 4), True, False, "gelu_tanh", False),
    (64, 32, 128, Tile(32, 64, 2, 2, 4), False, False, None, True),
    (8, 48, 256, Tile(16, 128, 1, 1, 4), True, True, None, False),
    (5, 32, 512, Tile(16, 128, 2, 1, 4), False, True, "silu", False),
    (16, 64, 128, Tile(32, 128, 1, 1, 4), False, False, None, True),
    (31, 16, 256, Tile(16, 256, 1, 1, 8), True, True, None, True),
    (7, 24, 256, Tile(8, 128, 1, 1, 4), True, True, None, True),
    (17, 24, 768, Tile(8, 256, 3, 1, 8), False, True, "gelu_tanh", False),
]


TILES = [  # tokens, tile, whether with an activation
    (1, Tile(8, 512, 1, 1, 4), False),
    (8, Tile(16, 1024, 1, 1, 8), True),
    (8, Tile(8, 1024, 3, 1, 4), True),
    (32, Tile(32, 512, 2, 1, 4), False),
    *(
        (few, tile, act)
        for few, tiles in module._UNMEASURED.items()
        for tile in tiles
        for act in (False, True)
    ),
    *(
        (few, Tile(*tile), key.endswith("g"))
        for table in json.loads(module.TABLES.read_text())
        for key, tiles in table["tiles"].items()
        for few, tile in zip(
            module.FEW, [tiles.get(str(f), tiles["16"]) for f in module.FEW], strict=True
        )
        if tile
    ),
]


def check(device: torch.device, dtype: torch.dtype, case: tuple) -> None:  # type: ignore[type-arg]
    """Output poisoned before, scratch and counters clean afterwards; twice, since they stay."""
    tokens, n, k, tile, has_bias, has_norm, act, has_residual = case
    rows = 2 * n if act else n

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    x, weight = random(tokens, k), random(rows, k) / k**0.5
    bias = random(rows) if has_bias else None
    norm = (random(k), 1e-5) if has_norm else None
    residual = random(tokens, n) if has_residual else None
    scratch = Scratch(
        torch.full((scratch_size(tokens, n, tile, act is not None),), torch.nan, device=device),
        torch.zeros(n // tile.n, dtype=torch.int32, device=device),
    )
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    wide_norm = None if norm is None else (norm[0].double(), norm[1])
    expected = fused_linear_torch(wide[0], wide[1], wide[2], wide_norm, act, wide[3])
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    for _ in range(2):
        out = fused_linear(x, weight, bias, norm, act, residual, tile, scratch)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert not scratch.arrived.any()


if envs.TRITON_INTERPRET:

    @pytest.mark.parametrize("case", CASES)
    def test_equals_float64(case: tuple) -> None:  # type: ignore[type-arg]
        check(torch.device("cpu"), torch.float32, case)

    @pytest.mark.parametrize("tokens", [1, 3])
    def test_float16_is_normed_before_it_can_overflow(
        tokens: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of massive activations, as some models have; their product with the norm's weight."""
        tile = Tile(16, 32, 1, 1, 4)
        monkeypatch.setattr(unquantized, "on_gpu", lambda x: True)
        monkeypatch.setattr(unquantized, "tile_for", lambda *size: tile)
        monkeypatch.setattr(
            unquantized, "scratch_of",
            lambda device: Scratch(torch.empty(0), torch.empty(0, dtype=torch.int32)),
        )  # fmt: skip
        build = Build(torch.float16, torch.device("cpu"), UnquantizedLinear, 1)
        layer = Linear(build, 96, (48,))
        weight = torch.randn(48, 96).half() / 10
        layer.weight.data.copy_(weight)
        layer.finalize()
        x, norm = torch.randn(tokens, 96).half(), torch.full((96,), 4.0).half()
        x[:, 5] = 30_000
        out = layer(x, NormSpec(norm, 1e-5))
        wide = fused_linear_torch(
            x.double(), weight.double(), None, (norm.double(), 1e-5), None, None
        )
        torch.testing.assert_close(out.double(), wide, rtol=1e-2, atol=1e-2)

else:

    @pytest.mark.gpu
    @pytest.mark.parametrize("case", CASES)
    def test_gpu_equals_float64(case: tuple) -> None:  # type: ignore[type-arg]
        check(torch.device("cuda"), torch.bfloat16, case)

    def test_interpreted() -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize(("few", "tile", "act"), sorted(set(TILES)))
    @pytest.mark.parametrize("arch", ARCHITECTURES)
    def test_compiles(arch: int, few: int, tile: Tile, act: bool) -> None:
        tile_m = module._tile_m(few, tile)
        types = dict.fromkeys(("x", "weight", "bias", "norm_weight", "residual", "out"), "*bf16")
        types |= {"partial": "*fp32", "arrived": "*i32", "eps": "fp32"}
        types |= {"num_tokens": "i32", "out_features": "i32"}
        compile_for(
            arch, module._linear_kernel, types, tile.warps, tile.stages,
            K=8 * tile.k * tile.splits, TILE_M=tile_m, TILE_N=tile.n,
            TILE_K=tile.k, SPLITS=tile.splits, NORM=True, ACT=int(act), BIAS=False,
            RESIDUAL=not act, PDL=True, PARTS=parts(tile_m, tile),
        )  # fmt: skip


def test_unmeasured_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"96x256": {1: (Tile(8, 64, 1, 1, 1),), 16: (), 32: (Tile(32, 64, 1, 3, 4),)}}
    monkeypatch.setattr(module, "_measured", lambda card: measured)
    device = torch.device("meta")
    module._tile_for.cache_clear()
    assert tile_for(1, 96, 256, False, device) == Tile(8, 64, 1, 1, 1)
    assert tile_for(2, 96, 256, False, device) is None  # measured, and a plain product was better
    assert tile_for(17, 96, 256, False, device) == Tile(32, 64, 1, 3, 4)
    assert tile_for(33, 96, 256, False, device) is None
    assert tile_for(1, 96, 256, True, device) == Tile(4, 256, 1, 1, 2)  # of another weight
    assert tile_for(9, 96, 256, True, device) == Tile(32, 64, 2, 3, 4)
    assert tile_for(65, 96, 256, True, device) is None
    assert tile_for(1, 97, 256, True, device) is None  # nothing divides it
    module._tile_for.cache_clear()
