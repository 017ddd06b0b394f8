# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""A per-tensor FP8 method through LinearMethod and the loader, against the dequantized model."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from llmserve.layers.base import Build, Layer
from llmserve.model_loader.loader import fill_from
from llmserve.model_loader.safetensors import SafetensorsSource
from llmserve.models.llama import LlamaForCausalLM
from llmserve.quantization.base import LinearMethod, NormSpec
from tests.helpers.run_model import description_of, load, prompt_logits, relative_error
from tests.helpers.tiny_models import write_tiny_model

FP8 = torch.float8_e4m3fn


class Fp8Linear(LinearMethod):
    """Weights float8_e4m3fn, one scale a checkpoint tensor, kept as one a row."""

    def create(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        assert not bias
        return {
            "weight": torch.empty(out_features, in_features, dtype=FP8, device=device),
            "weight_scale": torch.empty(out_features, dtype=torch.float32, device=device),
        }

    def finalize(self, params: dict[str, torch.Tensor]) -> None:
        self.weight, self.scale = params["weight"], params["weight_scale"]

    def apply(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype)) * self.scale


def test_fp8_checkpoint_equals_its_dequantized_self(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "dequantized", "llama")
    tensors = load_file(folder / "model.safetensors")
    quantized: dict[str, torch.Tensor] = {}
    for name, tensor in list(tensors.items()):
        if "_proj." not in name:
            quantized[name] = tensor
            continue
        scale = tensor.abs().max() / torch.finfo(FP8).max
        quantized[name] = (tensor / scale).to(FP8)
        quantized[f"{name}_scale"] = scale.reshape(1)
        tensors[name] = quantized[name].float() * scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(quantized, tmp_path / "fp8.safetensors", {"format": "pt"})

    description = description_of(folder)
    net = LlamaForCausalLM(description, Build(torch.float32, torch.device("cpu"), Fp8Linear, 512))
    fill_from(net, SafetensorsSource([str(tmp_path / "fp8.safetensors")]))
    for module in net.modules():
        if isinstance(module, Layer):
            module.finalize()
    prompts = [list(range(3, 60))]
    (ours,), (expected,) = prompt_logits(net, prompts), prompt_logits(load(description), prompts)
    assert relative_error(ours, expected) < 1e-5
