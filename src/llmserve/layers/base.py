# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""What every layer shares: how it is built, and the step between loading and running."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from llmserve.quantization.base import LinearMethod


@dataclass(frozen=True)
class Build:
    """What a model is built with besides its config.

    `max_model_len` is the length of the rope tables, and the fixed length for which dynamic and
    longrope scaling are computed.
    """

    dtype: torch.dtype
    device: torch.device
    linear: Callable[[], LinearMethod]
    max_model_len: int


class Block(nn.Module):
    """A module without hooks, and whose modules are found as attributes are: either costs a decode
    step on a CPU more than a matrix product."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__call__ = cls.forward  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.__dict__[name] = value


class Layer(Block):
    """A module whose parameters are allocated without values, filled by name, then finalized."""

    def new_parameter(self, name: str, value: torch.Tensor) -> None:
        """Registers a parameter that never has a gradient."""
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def finalize(self) -> None:
        """Once, after loading: turns the loaded parameters into what `forward` reads."""


class Loadable(Block):
    """What model_loader/ knows of a model.

    PACKED: our stacked linear -> the checkpoint's parts, in order of rows. RENAME: prefixes of
    checkpoint names -> ours; None drops the tensor (a vision tower).
    """

    PACKED: ClassVar[dict[str, tuple[str, ...]]] = {}
    RENAME: ClassVar[dict[str, str | None]] = {}
    weight_bytes: int = 0  # set by the loader
