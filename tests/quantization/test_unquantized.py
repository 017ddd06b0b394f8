# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmserve.kernels import cpu
from llmserve.kernels.fused_linear import Tile, fused_linear_torch
from llmserve.quantization import unquantized as module
from llmserve.quantization.unquantized import UnquantizedLinear

CPU = torch.device("cpu")


class OnGpu(torch.Tensor):
    """A tensor that says so."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "library", lambda: None)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 300])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)],
)
def test_product(
    dtype: torch.dtype,
    tolerance: float,
    rows: int,
    bias: bool,
    compiled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr(cpu, "library", lambda: None)
    method = UnquantizedLinear()
    params = method.create(96, 160, bias, dtype, CPU)
    assert {name: value.shape for name, value in params.items()} == (
        {"weight": (160, 96)} | ({"bias": (160,)} if bias else {})
    )
    for value in params.values():
        value.normal_()
    wide = {name: value.double() for name, value in params.items()}
    method.finalize(params)
    x = torch.randn(rows, 96, dtype=dtype)
    expected = F.linear(x.double(), wide["weight"], wide.get("bias"))
    scale = expected.abs().max().item() if rows else 1.0
    ours = method.apply(x)
    assert ours.dtype == dtype and ours.shape == (rows, 160)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=tolerance * scale)


def test_compiled_products_take_all_that_stands_around_them() -> None:
    """Of few tokens in float32; in bfloat16 where the processor has tiles, of more."""
    every = {"norm", "act", "residual"}
    for dtype, most in ((torch.float32, 32), (torch.bfloat16, 192)):
        method = UnquantizedLinear()
        params = method.create(64, 96, False, dtype, CPU)
        method.finalize({name: value.normal_() for name, value in params.items()})
        if cpu.product_of(torch.empty(1, 64, dtype=dtype)) is not None:
            assert method.weight is params["weight"] and not method.reordered
            for act in (False, True):
                assert method.fuses(most, act) == every and not method.fuses(most + 1, act)
        else:
            assert method.product is None and not method.fuses(1, False)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(("out_features", "wide"), [(256, True), (64, False)])
def test_reorders_where_that_is_faster(out_features: int, wide: bool) -> None:
    """float32 wide layers alone; bfloat16 all, where the processor multiplies it."""
    onednn = torch.backends.mkldnn.is_available()
    method = UnquantizedLinear()
    method.finalize(method.create(64, out_features, False, torch.float32, CPU))
    assert method.reordered == method.weight.is_mkldnn == (onednn and wide)
    method = UnquantizedLinear()
    method.finalize(method.create(64, out_features, False, torch.bfloat16, CPU))
    fast = onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert method.reordered == method.weight.is_mkldnn == fast


@pytest.mark.usefixtures("no_compiler")
def test_plain_where_onednn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    method = UnquantizedLinear()
    params = method.create(64, 256, False, torch.float32, CPU)
    params["weight"].normal_()
    method.finalize(params)
    x = torch.randn(3, 64)
    assert not method.reordered
    torch.testing.assert_close(method.apply(x), F.linear(x, params["weight"]))


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("tile", [None, Tile(4, 32, 1, 1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_what_a_gpu_fuses(monkeypatch: pytest.MonkeyPatch, tile: Tile | None, bias: bool) -> None:
    """With a tile everything, else the residual alone, in place and only into a plain product."""
    given: list[object] = []

    def fused(*args: Any) -> torch.Tensor:
        given.append(args[6])
        return fused_linear_torch(*args[:6])

    monkeypatch.setattr(module, "fused_linear", fused)
    monkeypatch.setattr(module, "scratch_of", lambda device: None)
    monkeypatch.setattr(module, "tile_for", lambda *size: tile)
    method = UnquantizedLinear()
    params = method.create(32, 48, bias, torch.bfloat16, CPU)
    for value in params.values():
        value.normal_()
    method.finalize(params)
    method.reordered = False
    method.weight = params["weight"].as_subclass(OnGpu)
    x, residual = torch.randn(3, 32).bfloat16(), torch.randn(3, 48).bfloat16()
    every = {"norm", "act", "residual"}
    assert method.fuses(3, True) == (every if tile else frozenset())
    assert method.fuses(3, False) == (every if tile else frozenset() if bias else {"residual"})
    method.weight = params["weight"].half().as_subclass(OnGpu)
    assert "norm" not in method.fuses(3, True)
    method.weight = params["weight"].as_subclass(OnGpu)
    kept = residual.clone()
    expected = F.linear(x, params["weight"], params.get("bias")) + kept
    if tile or not bias:
        out = method.apply(x, residual=residual)
        assert (out.data_ptr() == residual.data_ptr()) == (tile is None)
        torch.testing.assert_close(torch.as_tensor(out), expected, rtol=2e-2, atol=6e-2)
    assert len(given) == (tile is not None)
