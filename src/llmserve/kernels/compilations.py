# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Counts what this process compiles, and what compiled code it loads: after a server is ready, each
such case is a step that takes milliseconds to minutes longer.

torch.compile is not used. NVRTC and modules that CUDA loads lazily have no hook in Python; a
profiler trace shows them (worker/step_trace.py).
"""

import functools
import sys
from collections import deque
from typing import Any

from llmserve.core.messages import COMPILATION_KINDS

try:
    from triton import knobs
except ImportError:
    knobs = None

_FLASHINFER = "flashinfer.jit.core"


class Compilations:
    """`counts` by kind since `watch` was first called; `recent` names the last ones. Of Triton's
    kernels, by hash: which were `compiled`, by processes that this one started too, and which were
    `found` in the cache."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COMPILATION_KINDS, 0)
        self.compiled: set[str] = set()
        self.found: set[str] = set()
        self.recent: deque[str] = deque(maxlen=32)
        self._watched: set[str] = set()

    def watch(self) -> None:
        """Hooks into the compilers that are loaded by now; again for those loaded since."""
        if knobs is not None and "triton" not in self._watched:
            self._watched.add("triton")
            self._watch_triton()
        if _FLASHINFER in sys.modules and _FLASHINFER not in self._watched:
            self._watched.add(_FLASHINFER)
            spec = sys.modules[_FLASHINFER].JitSpec
            spec.build = self._counted("flashinfer", spec.build)
            spec.load = self._counted("flashinfer_load", spec.load)

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """What came to `counts` after a copy of it was taken; kinds without any are left out."""
        return {kind: n - before[kind] for kind, n in self.counts.items() if n > before[kind]}

    def _add(self, kind: str, name: str) -> None:
        self.counts[kind] += 1
        self.recent.append(f"{kind} {name}")

    def _watch_triton(self) -> None:
        other = knobs.compilation.listener

        def listen(*, src: Any, metadata: Any, cache_hit: bool, **rest: Any) -> None:
            self._add("triton_load" if cache_hit else "triton", src.name)
            (self.found if cache_hit else self.compiled).add(metadata["hash"])
            if other is not None:
                other(src=src, metadata=metadata, cache_hit=cache_hit, **rest)

        knobs.compilation.listener = listen

    def _counted(self, kind: str, method: Any) -> Any:
        @functools.wraps(method)
        def counted(spec: Any, *args: Any, **kwargs: Any) -> Any:
            self._add(kind, spec.name)
            return method(spec, *args, **kwargs)

        return counted


@functools.cache
def compilations() -> Compilations:
    """This process's."""
    return Compilations()
