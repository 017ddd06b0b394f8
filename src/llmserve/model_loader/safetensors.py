# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Weights from safetensors files, memory-mapped."""

from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmserve.errors import ConfigError


class SafetensorsSource:
    """All tensors of a model's files. safetensors checks that header and file length agree."""

    def __init__(self, files: list[str]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._opened: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt", device="cpu")
                for name in opened.keys():  # noqa: SIM118 (a method of safe_open)
                    piece = opened.get_slice(name)
                    if name in self.shapes:
                        raise ConfigError(f"{file}: tensor {name} is in another file, too")
                    self.shapes[name] = tuple(piece.get_shape())
                    self._opened[name] = opened
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{file} is not a whole safetensors file: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._opened[name].get_tensor(name)
        return tensor
