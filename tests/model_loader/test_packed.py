# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
import torch
from torch import nn

from llmserve.layers.base import Build
from llmserve.layers.linear import Linear
from llmserve.model_loader.packed import canonical_names, check, fill, parts
from llmserve.quantization.unquantized import UnquantizedLinear


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        build = Build(torch.float32, torch.device("cpu"), UnquantizedLinear, 1)
        self.block = nn.ModuleDict({"abc": Linear(build, 3, (4, 2, 2), True)})
        self.block["out"] = Linear(build, 8, (3,))


def test_parts_are_rows_in_the_maps_order() -> None:
    net = Net()
    wanted = {part.name: part for part in parts(net, {"abc": ("a", "b", "c")})}
    assert {name: tuple(part.target.shape) for name, part in wanted.items()} == {
        "block.a.weight": (4, 3), "block.b.weight": (2, 3), "block.c.weight": (2, 3),
        "block.a.bias": (4,), "block.b.bias": (2,), "block.c.bias": (2,),
        "block.out.weight": (3, 8),
    }  # fmt: skip
    for number, letter in enumerate("abc"):
        part = wanted[f"block.{letter}.weight"]
        fill(part, torch.full(part.target.shape, float(number)))
    expected = torch.tensor([0.0] * 4 + [1.0] * 2 + [2.0] * 2)
    assert torch.equal(net.block["abc"].weight[:, 1], expected)


def test_rename_takes_the_first_prefix_and_drops_none() -> None:
    names = canonical_names(
        dict.fromkeys(["wrap.model.x", "model.y", "vision.z", "lm_head.weight", "model.a"]),
        {"wrap.": "", "vision.": None},
        ("lm_head.weight",),
    )
    assert names == {"model.x": "wrap.model.x", "model.y": "model.y", "model.a": "model.a"}


def test_a_scale_of_a_whole_tensor_fills_its_rows() -> None:
    class Scaled(UnquantizedLinear):
        def create(
            self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype,
            device: torch.device,
        ) -> dict[str, torch.Tensor]:  # fmt: skip
            return {"weight_scale": torch.empty(out_features)}

    build = Build(torch.float32, torch.device("cpu"), Scaled, 1)
    layer = Linear(build, 3, (2, 1))
    net = nn.ModuleDict({"m": nn.ModuleDict({"ab": layer})})
    wanted = parts(net, {"ab": ("a", "b")})
    shapes = {"m.a.weight_scale": (1,), "m.b.weight_scale": ()}
    check(wanted, {name: name for name in shapes}, shapes)
    for part, value in zip(wanted, (torch.tensor([0.5]), torch.tensor(2.0)), strict=True):
        fill(part, value)
    assert layer.weight_scale.tolist() == [0.5, 0.5, 2.0]
