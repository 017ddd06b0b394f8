# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest
import torch
import torch.nn.functional as F

from llmserve.quantization.unquantized import UnquantizedLinear

CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)],
)
def test_product(dtype: torch.dtype, tolerance: float, rows: int, bias: bool) -> None:
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


def test_plain_where_onednn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    method = UnquantizedLinear()
    params = method.create(64, 256, False, torch.float32, CPU)
    params["weight"].normal_()
    method.finalize(params)
    x = torch.randn(3, 64)
    assert not method.reordered
    torch.testing.assert_close(method.apply(x), F.linear(x, params["weight"]))
