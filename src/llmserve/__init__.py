# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""llmserve: an OpenAI-compatible inference server for language models.

Nothing is imported here: what a program does about signals (`__main__`) comes right after.
"""

TYPE_CHECKING = False  # type checkers know the name; typing's would be an import
if TYPE_CHECKING:
    from llmserve.core.outputs import CompletionOutput, RequestOutput
    from llmserve.core.sampling_params import SamplingParams
    from llmserve.core.structured_outputs import StructuredOutputsParams
    from llmserve.frontend.async_llm import AsyncLLM
    from llmserve.frontend.beam_search import BeamSearchParams
    from llmserve.frontend.llm import LLM

__version__: str

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


if not TYPE_CHECKING:  # else any other name would be an object too

    def __getattr__(name: str) -> object:
        """Imports public names at first use, so that `import llmserve` costs nothing."""
        if name == "__version__":
            return _version()
        if name in _LAZY:
            from llmserve.utils.registry import load

            return load(_LAZY[name])
        raise AttributeError(f"module 'llmserve' has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llmserve")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0.0.0"
