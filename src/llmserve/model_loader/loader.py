# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""The one loader: builds a model and fills it, whatever the family and the file format."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from tqdm import tqdm

from llmserve.config.hf import ModelDescription
from llmserve.config.load import LoadConfig
from llmserve.errors import ConfigError
from llmserve.layers.base import Build, Layer, Loadable
from llmserve.model_loader import packed
from llmserve.model_loader.dummy import fill_dummy
from llmserve.model_loader.gguf import GGUFSource
from llmserve.model_loader.safetensors import SafetensorsSource
from llmserve.quantization.base import LinearMethod
from llmserve.quantization.registry import QUANTIZATIONS
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

_MAX_THREADS = 8


M = TypeVar("M", bound=Loadable)


class WeightSource(Protocol):
    """Named tensors of a checkpoint, in Hugging Face's names."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU; ConfigError if it cannot be read."""
        ...


def load_model(
    model_class: Callable[[ModelDescription, Build], M],
    model: ModelDescription,
    load: LoadConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> M:
    """Ready to run: built, filled, finalized. ConfigError names the tensor that is wrong.

    Rope tables are `model.max_model_len` long (see layers/rotary.py): a caller that serves a
    shorter context gives a description that says so.
    """
    start = time.perf_counter()
    linear: Callable[[], LinearMethod] = QUANTIZATIONS.load("unquantized")
    source = None if load.load_format == "dummy" else open_source(model)
    if source is not None:  # shapes are compared before memory is taken for them
        check(model_class(model, Build(dtype, torch.device("meta"), linear, 1)), source)
    try:
        net = model_class(model, Build(dtype, device, linear, model.max_model_len))
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{model.source.name} does not fit into memory: {reason}") from None
    if source is None:
        fill_dummy(net)
    else:
        fill_from(net, source)
    net.weight_bytes = sum(param.nbytes for param in net.parameters())
    for module in net.modules():
        if isinstance(module, Layer):
            module.finalize()
    logger.info(
        "loaded %.2f GiB of weights in %.1f s",
        net.weight_bytes / 2**30,
        time.perf_counter() - start,
    )
    return net.eval()


def open_source(model: ModelDescription) -> WeightSource:
    """The model's weight files."""
    if model.source.kind == "gguf":
        return GGUFSource(model.source.files, model.hf_config)
    return SafetensorsSource(model.source.files)


def check(net: Loadable, source: WeightSource) -> tuple[list[packed.Part], dict[str, str]]:
    """What the model wants, and our names to the source's. ConfigError where a name or a shape is
    not as it should be."""
    wanted = packed.parts(net, net.PACKED)
    # A tied output projection is the embedding; some checkpoints save it twice.
    tied = () if any(part.name == "lm_head.weight" for part in wanted) else ("lm_head.weight",)
    names = packed.canonical_names(source.shapes, net.RENAME, tied)
    packed.check(wanted, names, source.shapes)
    return wanted, names


def fill_from(net: Loadable, source: WeightSource) -> None:
    """Checks all names and shapes, then copies."""
    wanted, names = check(net, source)
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    bar = tqdm(total=len(wanted), desc="Loading weights", unit="tensor", disable=None)
    with bar, ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda part: packed.fill(part, source.read(names[part.name])), wanted):
            bar.update()
