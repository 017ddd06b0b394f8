# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`llmserve plan MODEL`: what a model needs and what fits, from config and headers alone.

The rules are those of a real start (engine/resolve.py); only the weights are counted, not loaded.
"""

import dataclasses
import math
from pathlib import Path

from llmserve.cli.args import parse_flags
from llmserve.cli.capacity import block_bytes, gib, plan_table
from llmserve.config import gguf
from llmserve.config.cache import CacheConfig
from llmserve.config.engine import ENGINE_GROUPS, EngineConfig
from llmserve.config.hf import ModelDescription, describe
from llmserve.config.model import ModelConfig
from llmserve.config.source import safetensors_header
from llmserve.core.kv_spec import AnyKVSpec, FullAttentionSpec, SlidingWindowSpec
from llmserve.engine.resolve import Facts, resolve
from llmserve.errors import ConfigError
from llmserve.models.common import DecoderConfig, Fields
from llmserve.models.registry import MODELS
from llmserve.worker.device import DeviceInfo, detect
from llmserve.worker.memory import free_memory
from llmserve.worker.worker import cpu_kv_bytes

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def read(config: EngineConfig) -> tuple[ModelDescription, int]:
    """The model's description and its number of parameters; of a hub model only the headers are
    fetched."""
    name = config.model.model
    if not name or Path(name).expanduser().exists() or config.load.load_format == "dummy":
        description = describe(config.model, config.load)
        return description, num_parameters(description)
    load = dataclasses.replace(config.load, load_format="dummy")
    return describe(config.model, load), _hub_parameters(config.model)


def _hub_parameters(model: ModelConfig) -> int:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    try:
        metadata = huggingface_hub.get_safetensors_metadata(
            model.model, revision=model.revision, token=model.hf_token
        )
    except (
        errors.NotASafetensorsRepoError, errors.SafetensorsParsingError, errors.HfHubHTTPError,
        errors.OfflineModeIsEnabled, httpx.HTTPError, OSError,
    ) as error:  # fmt: skip
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"cannot read the weight headers of {model.model}: {reason}") from None
    return sum(metadata.parameter_count.values())


def num_parameters(description: ModelDescription) -> int:
    """Elements of all tensors, from safetensors headers or GGUF tensor infos; without weight files
    (`--load-format dummy`) from the config's sizes, norms and biases left out."""
    source = description.source
    if source.kind == "gguf":
        header = gguf.read_header(source.files or [source.path])
        return sum(math.prod(tensor.shape) for tensor in header.tensors.values())
    if source.files:
        headers = map(safetensors_header, source.files)
        return sum(math.prod(info["shape"]) for header in headers for info in header.values())
    decoder = _decoder(description)
    attention = 2 * (decoder.num_heads + decoder.num_kv_heads) * decoder.head_dim
    layer = decoder.hidden_size * (attention + 3 * decoder.intermediate_size)
    embeddings = decoder.vocab_size * decoder.hidden_size * (1 if decoder.tied else 2)
    return embeddings + layer * len(decoder.windows)


def _decoder(description: ModelDescription) -> DecoderConfig:
    decoder: DecoderConfig = MODELS.load(description.architecture).read(
        Fields(description.hf_config)
    )
    return decoder


def kv_specs(description: ModelDescription, dtype_bytes: int) -> list[AnyKVSpec]:
    """What each layer keeps, by layer."""
    decoder = _decoder(description)
    heads, head_dim = decoder.num_kv_heads, decoder.head_dim
    return [
        FullAttentionSpec(heads, head_dim, dtype_bytes)
        if window is None
        else SlidingWindowSpec(heads, head_dim, dtype_bytes, window)
        for window in decoder.windows
    ]


def kv_bytes_available(cache: CacheConfig, device: DeviceInfo, weight_bytes: int) -> int:
    """Bytes for the KV cache; on a card less what a step's activations take, known once it ran."""
    if cache.kv_cache_memory_bytes is not None:
        return cache.kv_cache_memory_bytes
    if device.kind == "cpu":
        return cpu_kv_bytes(free_memory() - weight_bytes)
    budget = cache.gpu_memory or int(device.memory_bytes * cache.gpu_memory_utilization)
    return budget - weight_bytes


def run(argv: list[str]) -> int:
    """Prints the table; exit code 1 where the weights alone do not fit."""
    flags = parse_flags(
        argv, ENGINE_GROUPS, prog="llmserve plan",
        description="What a model needs and what fits, before anything is loaded.",
    )  # fmt: skip
    config = EngineConfig.from_flags(**flags)
    description, parameters = read(config)
    device = detect(config.device.device)
    config = resolve(config, Facts(description, device))
    dtype = config.model.dtype
    weight_bytes = parameters * _DTYPE_BYTES[dtype]
    kv_bytes = kv_bytes_available(config.cache, device, weight_bytes)
    specs = kv_specs(description, _DTYPE_BYTES[dtype])
    size = config.cache.block_size
    blocks = config.cache.num_gpu_blocks_override or kv_bytes // block_bytes(specs, size)
    blocks -= 1  # the padding block
    asked = config.model.max_model_len
    length = asked if asked and asked > 0 else description.max_model_len
    assert config.scheduler.max_num_batched_tokens is not None
    print(f"{device.name}, {gib(device.memory_bytes)}")
    print(
        plan_table(
            model=description.source.name, dtype=dtype, weight_bytes=weight_bytes, specs=specs,
            block_size=size, num_blocks=max(0, blocks), max_model_len=length,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        )
    )  # fmt: skip
    if kv_bytes <= 0:
        print(f"The weights do not fit: {gib(-kv_bytes)} too little.")
    return int(kv_bytes <= 0)
