# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""How a linear layer keeps its weight and multiplies by it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm of a linear's input: `weight` [in_features], offset already (Gemma's 1 + w)."""

    weight: torch.Tensor
    eps: float


class LinearMethod(ABC):
    """One linear's weight. layers/ composes what `apply` does not do natively.

    What it does, as `fuses` names it: "norm" (RMSNorm of the input), "act" (gated activation of
    the output's halves), "residual" (adds to the output, and may overwrite what it adds). `apply`
    gets no other argument.
    """

    def fuses(self, num_tokens: int, act: bool) -> frozenset[str]:
        """What `apply` can be asked for with so many tokens; `act`: where an activation follows."""
        return frozenset()

    @abstractmethod
    def create(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, torch.Tensor]:
        """Empty parameters by checkpoint suffix: weight, bias, weight_scale, ..."""

    @abstractmethod
    def finalize(self, params: dict[str, torch.Tensor]) -> None:
        """After loading: repack into what `apply` reads (stable addresses from here on)."""

    @abstractmethod
    def apply(
        self,
        x: torch.Tensor,
        norm: NormSpec | None = None,
        act: str | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x` [num_tokens, in_features] -> [num_tokens, out_features] (half of it with `act`)."""
