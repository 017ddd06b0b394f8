# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""`system_fingerprint`: equal seeds give equal tokens as long as it is the same.

It covers what the numbers are computed from and with, and nothing else: not names, paths, limits,
chat templates or sampling defaults.
"""

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from llmserve import __version__
from llmserve.config.engine import EngineConfig
from llmserve.config.hf import ModelDescription
from llmserve.executor.base import ModelFacts

_SAMPLES = 256  # of each weight file
_SAMPLE_BYTES = 4096
_LIBRARIES = ("torch", "triton", "flashinfer-python")  # whose kernels compute
# Keys of config.json that no computation reads.
_NAMES = frozenset(
    {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype",
     "transformers_version", "use_cache"}
)  # fmt: skip


def fingerprint(
    config: EngineConfig, model: ModelDescription, facts: ModelFacts, device_name: str
) -> str:
    """`llmserve-VERSION-HASH` of a resolved config and a loaded model."""
    dummy = config.load.load_format == "dummy"
    numerics = [
        __version__,
        [_version(name) for name in _LIBRARIES],
        model.architecture,
        {
            key: value
            for key, value in model.hf_config.items()
            if key not in _NAMES and not key.startswith("_")
        },
        "dummy" if dummy else content_id(model.source.files),
        facts.dtype,
        facts.kernels,
        device_name,
        config.cache.kv_cache_dtype,
        config.device.tensor_parallel_size,
        config.model.quantization,
        config.model.logits_processors,
    ]
    digest = hashlib.sha256(msgspec.json.encode(numerics, order="sorted")).hexdigest()
    return f"llmserve-{__version__}-{digest[:8]}"


def content_id(files: Sequence[str]) -> str:
    """Of weight files by their contents: sizes, and evenly spaced samples with both ends.

    Reads about 1 MiB a file, whatever its size. Training changes nearly every byte; an edit of a
    few single numbers can go unseen.
    """
    digest = hashlib.sha256()
    for name in files:
        with Path(name).open("rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            last = max(0, size - _SAMPLE_BYTES)
            for index in range(_SAMPLES):
                file.seek(last * index // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
