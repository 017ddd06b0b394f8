# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import torch

from llmserve.layers.base import Layer


def test_parameters_keep_their_dtype_and_have_no_gradient() -> None:
    layer = Layer()
    for dtype in (torch.uint8, torch.float8_e4m3fn, torch.bfloat16):
        layer.new_parameter(f"of_{str(dtype)[6:]}", torch.empty(2, dtype=dtype))
    kinds = {name: param.dtype for name, param in layer.named_parameters()}
    assert set(kinds.values()) == {torch.uint8, torch.float8_e4m3fn, torch.bfloat16}
    assert not any(param.requires_grad for param in layer.parameters())
