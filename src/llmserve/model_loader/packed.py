# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Which checkpoint tensors fill which parameter, and the checks that they do."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from llmserve.errors import ConfigError
from llmserve.layers.linear import Linear

_CASTABLE = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_SKIPPED = (".rotary_emb.inv_freq",)  # a buffer that old Llama checkpoints saved


@dataclass(frozen=True)
class Part:
    """A checkpoint tensor, and the parameter or rows of one that it fills."""

    name: str
    target: torch.Tensor


def parts(model: nn.Module, packed: Mapping[str, tuple[str, ...]]) -> list[Part]:
    """One per checkpoint tensor that the model wants. Targets are views of its parameters."""
    found = []
    for name, param in model.named_parameters():
        path, _, suffix = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        if leaf not in packed:
            found.append(Part(name, param.data))
            continue
        layer = model.get_submodule(path)
        assert isinstance(layer, Linear) and len(layer.output_sizes) == len(packed[leaf])
        start = 0
        for piece, rows in zip(packed[leaf], layer.output_sizes, strict=True):
            view = param.data[start : start + rows]
            found.append(Part(f"{parent}.{piece}.{suffix}", view))
            start += rows
    return found


def canonical_names(
    names: Mapping[str, object], rename: Mapping[str, str | None], skipped: tuple[str, ...]
) -> dict[str, str]:
    """Our name -> the checkpoint's, for every tensor that RENAME does not drop."""
    result: dict[str, str] = {}
    for name in names:
        ours: str | None = name
        for prefix, replacement in rename.items():
            if name.startswith(prefix):
                ours = None if replacement is None else replacement + name.removeprefix(prefix)
                break
        if ours is not None and ours not in skipped and not ours.endswith(_SKIPPED):
            result[ours] = name
    return result


def check(
    wanted: list[Part], names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """ConfigError for the first tensor that is missing, of another shape, or of no use."""
    for part in wanted:
        if part.name not in names:
            raise ConfigError(f"the weights lack tensor {part.name} {list(part.target.shape)}")
        shape = shapes[names[part.name]]
        if shape != tuple(part.target.shape) and not _spreads(part, shape):
            raise ConfigError(
                f"tensor {part.name} has shape {list(shape)}, "
                f"the config asks for {list(part.target.shape)}"
            )
    if useless := sorted(names.keys() - {part.name for part in wanted}):
        more = f" (and {len(useless) - 1} more)" if len(useless) > 1 else ""
        raise ConfigError(f"tensor {useless[0]}{more} has no place in the model")


def _spreads(part: Part, shape: tuple[int, ...]) -> bool:
    """A quantization scale of a whole tensor fills one row of scales."""
    return part.name.endswith("_scale") and shape in ((), (1,))


def fill(part: Part, tensor: torch.Tensor) -> None:
    """Copies, casts between float types, and refuses what is not finite afterwards."""
    if tensor.dtype != part.target.dtype and not {tensor.dtype, part.target.dtype} <= _CASTABLE:
        raise ConfigError(
            f"tensor {part.name} is {_name(tensor.dtype)}, "
            f"the model wants {_name(part.target.dtype)}"
        )
    part.target.copy_(tensor)
    if part.target.is_floating_point() and part.target.itemsize > 1:
        low, high = torch.aminmax(part.target)
        if not (low.isfinite() and high.isfinite()):
            raise ConfigError(f"tensor {part.name} is not finite in {_name(part.target.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
