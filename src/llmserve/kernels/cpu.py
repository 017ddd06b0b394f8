# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the llmserve project
"""Calls into csrc/cpu_decode.cpp, compiled at the first start. Where it cannot be, torch's
operations do the same work, and the start says so.

What a function computes is the reference's in the file of its op: rms_norm.py, silu_mul.py,
rope_write.py, fused_linear.py, attention/torch_sdpa.py. Tensors are float32 or bfloat16, in rows
contiguous in themselves; threads are torch's own. Whoever calls has asked `compiled_for`.
"""

import ctypes
import functools
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmserve import envs
from llmserve.kernels.cpu_build import build
from llmserve.utils.logger import get_logger

logger = get_logger(__name__)

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {  # the order of the first six is that of `run`
    "linear": [_P, _P, _L, _L, _P, _F, _I, _P, _P, _I, _I, _I],
    "attention": [_P] * 5 + [_L] * 8 + [_F, _F, _I],
    "rope": [_P] * 7 + [_F] + [_L] * 6 + [_I, _I],
    "rms_norm": [_P, _L, _P, _F, _P, _L, _L, _I, _I],
    "gated_act": [_P, _P, _L, _L, _I, _I],
    "embedding": [_P, _P, _P, _F, _L, _L, _L, _I],
    "init": [_P, _P],
    "run": [_P, _L, _L],
}
_ACTS = {None: 0, "silu": 1, "gelu_tanh": 2}
_DTYPES = frozenset({torch.float32, torch.bfloat16})
_LOCK = threading.Lock()


class Library(ctypes.CDLL):
    """The functions. `has_tiles`: whether `linear` multiplies bfloat16."""

    has_tiles: bool


@functools.cache
def library() -> Library | None:
    """The compiled functions, or None where there are none. Waits for a build."""
    with _LOCK:
        return _library()


@functools.cache
def _library() -> Library | None:
    try:
        loaded_by_torch = ctypes.CDLL(None)
        openmp = (loaded_by_torch.GOMP_parallel, loaded_by_torch.omp_get_max_threads)
        loaded = Library(str(build(envs.CACHE_DIR / "kernels")))
    except AttributeError:
        problem = "torch has no GNU OpenMP"
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    else:
        for name, types in _SIGNATURES.items():
            function = getattr(loaded, f"llmserve_{name}")
            function.argtypes, function.restype = types, _I if name == "init" else None
            setattr(loaded, name, function)
        loaded.has_tiles = bool(loaded.init(*(ctypes.cast(f, _P) for f in openmp)))
        return loaded
    logger.warning("CPU kernels: torch's own, which are slower, as none can be built: %s", problem)
    return None


def library_id() -> str:
    """Of the compiled functions, or of torch's: sums are in another order. Waits for a build."""
    return "torch" if (lib := library()) is None else Path(lib._name).stem


def start_building() -> None:
    """Builds, if need be, while the caller goes on."""
    threading.Thread(target=library, name="build-kernels", daemon=True).start()


def compiled_for(x: torch.Tensor) -> Library | None:
    """The functions, where they can work on `x`: on a CPU, in float32 or bfloat16."""
    if x.is_cpu and x.dtype in _DTYPES and not envs.TRITON_INTERPRET:
        return library()
    return None


def product_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> "Product | None":
    """What `linear` multiplies by, where it can: float32 everywhere, bfloat16 where the processor
    has tiles for it."""
    lib = compiled_for(weight)
    if lib is None or (
        weight.dtype == torch.bfloat16 and not (lib.has_tiles and weight.shape[1] % 32 == 0)
    ):
        return None
    return Product(lib, weight, bias)


class Product(ctypes.Structure):
    """A weight [rows, size] with its bias, both of one dtype, as `linear` reads them."""

    _fields_ = (("weight", _P), ("bias", _P), ("rows", _L), ("size", _L))

    def __init__(
        self, lib: Library, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        assert weight.is_contiguous() and (bias is None or bias.dtype == weight.dtype)
        super().__init__(
            weight.data_ptr(), None if bias is None else bias.data_ptr(), *weight.shape
        )
        self.lib, self.kept = lib, (weight, bias)
        self.address = ctypes.addressof(self)


def linear(
    product: Product,
    x: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    act: str | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """act(norm(x) W^T + bias) + residual; `residual`, contiguous, is overwritten and returned. `x`
    is of the weight's dtype, and the result of `dtype` where it is given."""
    tokens = x.shape[0]
    if residual is not None:
        out = residual
    else:
        width = product.rows // 2 if act else product.rows
        out = torch.empty(tokens, width, dtype=dtype or x.dtype)
    if tokens:
        half = x.dtype == torch.bfloat16
        norm_at, eps, norm_half = None, 0.0, False
        if norm is not None:
            weight, eps = norm
            norm_at, norm_half = weight.data_ptr(), weight.dtype == torch.bfloat16
        to = out.data_ptr()
        product.lib.linear(
            product.address, x.data_ptr(), tokens, x.stride(0), norm_at, eps, _ACTS[act],
            None if residual is None else to, to, half, norm_half, out.dtype == torch.bfloat16,
        )  # fmt: skip
    return out


def attention(
    lib: Library,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Rows of one token each: `query` [num_rows, num_heads, head_dim], heads contiguous, `out`
    contiguous, `kv_cache` [num_blocks, 2, num_kv_heads, block_size, head_dim], `block_table` int32
    [>= num_rows, max_blocks], `seq_lens` int32 [>= num_rows]; head_dim a multiple of 16."""
    rows, heads, size = query.shape
    lib.attention(
        query.data_ptr(), kv_cache.data_ptr(), block_table.data_ptr(), seq_lens.data_ptr(),
        out.data_ptr(), rows, heads, kv_cache.shape[2], size, kv_cache.shape[3], query.stride(0),
        block_table.stride(0), window or 0, scale, softcap or 0.0, query.dtype == torch.bfloat16,
    )  # fmt: skip


def rope_write(
    lib: Library,
    heads: torch.Tensor,
    num_kv_heads: int,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """See kernels/rope_write.py; the query stays in place."""
    tokens, all_heads, size = heads.shape
    q_norm = k_norm = None
    eps, norm_half = 0.0, False
    if norms is not None:
        q_weight, k_weight, eps = norms
        q_norm, k_norm = q_weight.data_ptr(), k_weight.data_ptr()
        norm_half = q_weight.dtype == torch.bfloat16
    lib.rope(
        heads.data_ptr(), positions.data_ptr(), slot_mapping.data_ptr(), cos_sin_cache.data_ptr(),
        kv_cache.data_ptr(), q_norm, k_norm, eps, tokens, all_heads, num_kv_heads, size,
        cos_sin_cache.shape[1], kv_cache.shape[3], heads.dtype == torch.bfloat16, norm_half,
    )  # fmt: skip
    return heads.narrow(1, 0, all_heads - 2 * num_kv_heads)


def rms_norm(lib: Library, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See kernels/rms_norm.py."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype)
    lib.rms_norm(
        rows.data_ptr(), rows.stride(0), weight.data_ptr(), eps, out.data_ptr(), rows.shape[0],
        size, x.dtype == torch.bfloat16, weight.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


def gated_act(lib: Library, x: torch.Tensor, kind: str) -> torch.Tensor:
    """See kernels/silu_mul.py."""
    tokens, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(tokens, size)
    lib.gated_act(
        x.data_ptr(), out.data_ptr(), tokens, size, _ACTS[kind], x.dtype == torch.bfloat16
    )
    return out


def embedding(
    lib: Library, table: torch.Tensor, token_ids: torch.Tensor, scale: float
) -> torch.Tensor:
    """Rows of `table` [rows, size] times `scale`; NaN for an id that is not in it."""
    tokens, (rows, size) = token_ids.shape[0], table.shape
    out = torch.empty(tokens, size, dtype=table.dtype)
    lib.embedding(
        table.data_ptr(), token_ids.data_ptr(), out.data_ptr(), scale, tokens, rows, size,
        table.dtype == torch.bfloat16,
    )  # fmt: skip
    return out


class _Step(ctypes.Structure):
    _fields_ = (("function", _L), ("at", _L * 16), ("number", _F * 2))


class _OnlyCompiled(TorchDispatchMode):
    """Keeps every tensor that is made, and the name of the first operation that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.foreign: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        if not (func.is_view or func.overloadpacket.__name__ in _ALLOCATES):
            self.foreign = self.foreign or str(func)
        return out


_ALLOCATES = ("empty", "new_empty")


class Recording:
    """The calls that `function` makes, to be made again at once with as many tokens or fewer.

    Its tensors are those of the first run: inputs are to be changed in place, and `result` is
    overwritten. `foreign` names an operation of torch's that `function` needs too, and that would
    be missing: then there is nothing to run.
    """

    def __init__(self, lib: Library, function: Callable[[], torch.Tensor]) -> None:
        self._lib = lib
        self._calls: list[_Step] = []
        originals = {name: getattr(lib, name) for name in _RECORDED}
        for name, original in originals.items():
            setattr(lib, name, functools.partial(self._record, name, original))
        try:
            with _OnlyCompiled() as mode:
                self.result = function()
        finally:
            for name, original in originals.items():
                setattr(lib, name, original)
        self.foreign = mode.foreign
        self._kept = mode.kept
        self._steps = (_Step * len(self._calls))(*self._calls)
        self._address = ctypes.addressof(self._steps)

    def _record(self, name: str, original: Callable[..., None], *args: Any) -> None:
        given = list(zip(args, _SIGNATURES[name], strict=True))
        floats = [value for value, kind in given if kind is _F]
        others = [value or 0 for value, kind in given if kind is not _F]
        index = _RECORDED.index(name)
        self._calls.append(_Step(index, (_L * 16)(*others), (_F * 2)(*floats)))
        original(*args)

    def run(self, tokens: int) -> None:
        """Makes the calls for the first `tokens` tokens."""
        self._lib.run(self._address, len(self._calls), tokens)


_RECORDED = list(_SIGNATURES)[:6]
