# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import pytest
import torch
import torch.nn.functional as F

from llmserve.layers.base import Build
from llmserve.layers.mlp import GatedMLP
from llmserve.quantization.base import NormSpec
from llmserve.quantization.unquantized import UnquantizedLinear


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_equals_the_formula(activation: str, bias: bool) -> None:
    build = Build(torch.float32, torch.device("cpu"), UnquantizedLinear, 1)
    mlp = GatedMLP(build, 16, 24, activation, bias)
    for param in mlp.parameters():
        param.data.normal_()
    values = {name: param.data.double() for name, param in mlp.named_parameters()}
    for layer in (mlp.gate_up_proj, mlp.down_proj):
        layer.finalize()
    x, residual, scale = torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)
    normed = F.rms_norm(x.double(), (16,), scale.double(), 1e-5)
    inner = F.linear(normed, values["gate_up_proj.weight"], values.get("gate_up_proj.bias"))
    gate, up = inner[:, :24], inner[:, 24:]
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    out = F.linear(gate * up, values["down_proj.weight"], values.get("down_proj.bias"))
    ours = mlp(x, NormSpec(scale, 1e-5), residual.clone())  # may be overwritten
    torch.testing.assert_close(ours.double(), out + residual.double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mlp(x, NormSpec(scale, 1e-5)).double(), out, rtol=1e-4, atol=1e-3)
