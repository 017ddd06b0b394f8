# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""llmserve: an OpenAI-compatible inference server for language models."""

from importlib.metadata import PackageNotFoundError, version

from llmserve.utils.registry import load

try:
    __version__ = version("llmserve")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

_LAZY = {
    "LLM": "llmserve.frontend.llm:LLM",
    "AsyncLLM": "llmserve.frontend.async_llm:AsyncLLM",
    "BeamSearchParams": "llmserve.frontend.beam_search:BeamSearchParams",
    "SamplingParams": "llmserve.core.sampling_params:SamplingParams",
    "StructuredOutputsParams": "llmserve.core.structured_outputs:StructuredOutputsParams",
    "RequestOutput": "llmserve.core.outputs:RequestOutput",
    "CompletionOutput": "llmserve.core.outputs:CompletionOutput",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Imports public names at first use, so that `import llmserve` costs nothing."""
    if name in _LAZY:
        return load(_LAZY[name])
    raise AttributeError(f"module 'llmserve' has no attribute {name!r}")
